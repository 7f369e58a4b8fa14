"""Checkpoints of other programs, tampered with: each is refused by an error that says where and what, and costs nothing.

Every case goes through loading and through ``verify``. Loading may take what the file takes and no more than 64 MB beside it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_quant
from hf_quant.errors import HfQuantError
from hf_quant.jobs.verify import verify

FIXTURES = Path(__file__).parents[1] / "fixtures"
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.1.up_proj"
BEYOND = 64 << 20  # bytes that a refusal may take besides the file

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, dict[str, Any]], Any]


def value(name: str, number: float, at: int = 3) -> Change:
    """One number becomes another."""

    def change(tensors: Tensors, _: dict[str, Any]) -> None:
        flat = tensors[name].clone().view(-1)
        flat[min(at, len(flat) - 1)] = number
        tensors[name] = flat.view(tensors[name].shape)

    return change


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """One tensor becomes another."""
    return lambda tensors, _: tensors.update({name: make(tensors[name]).contiguous()})


def gone(*names: str) -> Change:
    """Some tensors are missing."""
    return lambda tensors, _: [tensors.pop(name) for name in names]


def said(**fields: Any) -> Change:
    """The quantization_config says something else."""
    return lambda _, config: config["quantization_config"].update(fields)


def model(**fields: Any) -> Change:
    """config.json says something else."""
    return lambda _, config: config.update(fields)


def state(**fields: Any) -> Change:
    """The JSON beside a four-bit weight says something else."""

    def change(tensors: Tensors, _: dict[str, Any]) -> None:
        name = f"{UP}.weight.quant_state.bitsandbytes__nf4"
        stored = json.loads(bytes(tensors[name].tolist())) | fields
        tensors[name] = torch.tensor(list(json.dumps(stored).encode()), dtype=torch.uint8)

    return change


def text(raw: bytes) -> Change:
    """It is something else altogether."""
    return tensor(f"{UP}.weight.quant_state.bitsandbytes__nf4", lambda _: torch.tensor(list(raw), dtype=torch.uint8))


def added(name: str, made: torch.Tensor) -> Change:
    """One tensor more."""
    return lambda tensors, _: tensors.update({name: made})


def copied(layer: str, to: str) -> Change:
    """A layer stands twice, the second time under another name."""
    return lambda tensors, _: tensors.update(
        {n.replace(layer, to): t.clone() for n, t in tensors.items() if layer in n}
    )


def renumbered(old: str, new: str) -> Change:
    """A layer has another name."""
    return lambda tensors, _: [
        tensors.update({n.replace(old, new): tensors.pop(n)}) for n in list(tensors) if old in n
    ]


NAN, INF = float("nan"), float("inf")
GPTQ, ORDER, ASYM, MOE = "gptq-4bit", "gptq-4bit-act-order", "gptq-4bit-asym", "gptq-4bit-act-order-moe"
BNB, DOUBLE, INT8 = "bnb-nf4", "bnb-nf4-double", "bnb-int8"
CASES: dict[str, tuple[str, Change, str]] = {
    # orders of columns
    "g_idx beyond the groups": (ORDER, value(f"{UP}.g_idx", 2), rf"{UP}: g_idx.*not inside the 2 groups"),
    "g_idx far beyond": (ORDER, value(f"{UP}.g_idx", 2**31 - 1), rf"{UP}: g_idx"),
    "g_idx negative": (ORDER, value(f"{UP}.g_idx", -1), rf"{UP}: g_idx"),
    "g_idx far negative": (ORDER, value(f"{UP}.g_idx", -(2**31)), rf"{UP}: g_idx"),
    "g_idx all zero": (ORDER, tensor(f"{UP}.g_idx", torch.zeros_like), rf"{UP}: g_idx.*64 columns each"),
    "g_idx fills one group more": (ORDER, tensor(f"{UP}.g_idx", lambda t: t.sort().values.clamp(max=0)), rf"{UP}: g_idx"),
    "g_idx short": (ORDER, tensor(f"{UP}.g_idx", lambda t: t[:-1]), rf"{UP}: g_idx has shape \[127\]"),
    "g_idx of floats": (ORDER, tensor(f"{UP}.g_idx", torch.Tensor.float), rf"{UP}: g_idx has dtype"),
    "g_idx missing": (ORDER, gone(f"{UP}.g_idx"), rf"{UP}: g_idx is missing"),
    "g_idx of one expert": (MOE, value(f"{EXPERT}.g_idx", 77), rf"{EXPERT}: g_idx"),
    "g_idx in compressed-tensors": ("ct-4bit-act-order", value(f"{UP}.weight_g_idx", 4), rf"{UP}: weight_g_idx"),
    "g_idx long in compressed-tensors": ("ct-4bit-act-order", tensor(f"{UP}.weight_g_idx", lambda t: t.repeat(2)), rf"{UP}: weight_g_idx"),
    # scales and zero points
    "scale NaN": (GPTQ, value(f"{UP}.scales", NAN), rf"{UP}: scales: 1 scales"),
    "scale infinite": (ASYM, value(f"{UP}.scales", -INF), rf"{UP}: scales: 1 scales"),
    "scales zeroed": (GPTQ, tensor(f"{UP}.scales", torch.zeros_like), rf"{UP}: scales: all scales are zero"),
    "scales of integers": (GPTQ, tensor(f"{UP}.scales", lambda t: t.to(torch.int16)), rf"{UP}: scales has dtype int16"),
    "scales in double": (GPTQ, tensor(f"{UP}.scales", torch.Tensor.double), rf"{UP}: scales has dtype float64"),
    "scales of other groups": (ASYM, tensor(f"{UP}.scales", lambda t: t[::2]), rf"{UP}: qzeros has shape"),
    "scale of an expert NaN": (MOE, value(f"{EXPERT}.scales", NAN), r"experts.*scales: 1 scales"),
    "scale of an AWQ layer": ("awq-gemm", value(f"{UP}.scales", INF), rf"{UP}: scales"),
    "scale of a GEMV layer": ("awq-gemv", value(f"{UP}.scales", NAN, 0), rf"{UP}: scales"),
    "shifted zero points NaN": ("awq-gemv-fast", value(f"{UP}.qzeros", NAN, 0), rf"{UP}: qzeros"),
    "shifted zero points not integers": ("awq-gemv-fast", value(f"{UP}.qzeros", 0.123, 0), rf"{UP}: qzeros: not -scale times"),
    "zero points of another version": (GPTQ, said(checkpoint_format="gptq_v2", format="gptq_v2"), rf"{Q}.*|qzeros: not all zero points are 8"),
    "zero points of the other version": ("gptq-4bit-v2", said(checkpoint_format="gptq", format="gptq"), "checkpoint_format or sym does not tell the truth"),
    "called symmetric": (ASYM, said(sym=True), "sym does not tell the truth"),
    "called symmetric by AWQ": ("awq-gemm", said(zero_point=False), "zero_point in the config does not tell the truth"),
    "zero points missing": (GPTQ, gone(f"{UP}.qzeros"), rf"{UP}: qzeros is missing"),
    "zero points of floats": (GPTQ, tensor(f"{UP}.qzeros", torch.Tensor.float), rf"{UP}: qzeros has dtype"),
    "zero points of another width": (GPTQ, tensor(f"{UP}.qzeros", lambda t: t[:, :3]), rf"{UP}: qzeros has 3 words"),
    "signed zero point too large": ("ct-naive-4bit", value(f"{UP}.weight_zero_point", 99), rf"{UP}: weight_zero_point.*not those of 4 bits"),
    "zero point of torchao": ("torchao-int8", value(f"{UP}._weight_zero_point", 1), rf"{UP}: _weight_zero_point: not all are zero"),
    "real zero point infinite": ("hqq-4bit", value(f"{UP}.zero", INF), rf"{UP}: zero: some zero points"),
    "scale of HQQ": ("hqq-4bit", value(f"{UP}.scale", NAN), rf"{UP}: scale"),
    "SCB NaN": (INT8, value(f"{UP}.SCB", NAN), rf"{UP}: SCB"),
    "SCB short": (INT8, tensor(f"{UP}.SCB", lambda t: t[:-1]), rf"{UP}: SCB has shape \[127\]"),
    "SCB missing": (INT8, gone(f"{UP}.SCB"), rf"{UP}: SCB is missing"),
    "absmax NaN": (BNB, value(f"{UP}.weight.absmax", NAN), rf"{UP}: weight.absmax"),
    "absmax short": (BNB, tensor(f"{UP}.weight.absmax", lambda t: t[:-1]), rf"{UP}: weight.absmax has shape"),
    "absmax of bytes": (BNB, tensor(f"{UP}.weight.absmax", lambda t: t.to(torch.uint8)), rf"{UP}: weight.absmax has dtype"),
    "nested absmax infinite": (DOUBLE, value(f"{UP}.weight.nested_absmax", INF, 0), rf"{UP}: weight.absmax"),
    "nested map NaN": (DOUBLE, tensor(f"{UP}.weight.nested_quant_map", lambda t: t * NAN), rf"{UP}: weight.absmax"),
    "nested map short": (DOUBLE, tensor(f"{UP}.weight.nested_quant_map", lambda t: t[:200]), rf"{UP}: weight.nested_quant_map"),
    "float8 scale NaN": ("ct-fp8-tensor", value(f"{UP}.weight_scale", NAN, 0), rf"{UP}: weight_scale"),
    "float8 scale missing": ("ct-fp8-tensor", gone(f"{UP}.weight_scale"), rf"{UP}: weight_scale is missing"),
    "float8 blocks of another size": ("ct-fp8-block", tensor(f"{UP}.weight_scale", lambda t: t[:1]), rf"{UP}: weight_scale has shape"),
    "float8 value NaN": ("ct-fp8-tensor", tensor(f"{UP}.weight", lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype)), rf"{UP}.*NaN or infinite"),
    # codes
    "codes missing": (GPTQ, gone(f"{UP}.qweight"), rf"{UP}: qweight is missing"),
    "codes short": (GPTQ, tensor(f"{UP}.qweight", lambda t: t[:-1]), rf"{UP}"),
    "codes transposed": ("gptq-4bit", tensor(f"{UP}.qweight", lambda t: t.T), rf"{UP}: qweight has shape"),
    "codes of floats": (GPTQ, tensor(f"{UP}.qweight", torch.Tensor.float), rf"{UP}: qweight has dtype float32"),
    "codes without axes": (GPTQ, tensor(f"{UP}.qweight", lambda t: t.flatten()[0]), rf"{UP}: qweight has shape"),
    "no codes at all": (GPTQ, tensor(f"{UP}.qweight", lambda t: t[:0]), rf"{UP}: qweight has shape"),
    "scales of an activation": ("awq-gemm", gone(f"{UP}.qweight", f"{UP}.qzeros"), rf"{UP}: only scales: ScaledActivation of AutoAWQ"),
    "codes of AWQ short": ("awq-gemm", tensor(f"{UP}.qweight", lambda t: t[:-8]), rf"{UP}"),
    "codes of GEMV short": ("awq-gemv", tensor(f"{UP}.qweight", lambda t: t[:, :-1]), rf"{UP}"),
    "codes of GEMV-fast short": ("awq-gemv-fast", tensor(f"{UP}.qweight", lambda t: t[:-1]), rf"{UP}"),
    "codes too large for four bits": ("ct-naive-4bit", value(f"{UP}.weight", 99), rf"{UP}: weight: values.*not those of 4 bits"),
    "codes too large for torchao": ("torchao-int4-unpacked", value(f"{UP}._weight_qdata", -9), rf"{UP}: _weight_qdata"),
    "packed codes of another width": ("ct-4bit", tensor(f"{UP}.weight_packed", lambda t: t[:, ::2]), rf"{UP}: weight_packed has shape"),
    "packed codes missing": ("ct-4bit", gone(f"{UP}.weight_packed"), rf"{UP}"),
    "codes of bitsandbytes short": (BNB, tensor(f"{UP}.weight", lambda t: t[:-1]), rf"{UP}: weight has shape"),
    "codes of HQQ short": ("hqq-3bit", tensor(f"{UP}.W_q", lambda t: t[:-1]), rf"{UP}: W_q has shape"),
    "codes of HQQ missing": ("hqq-4bit", gone(f"{UP}.W_q"), rf"{UP}"),
    "codes of quanto in another type": ("quanto-int8", tensor(f"{UP}.weight._data", lambda t: t.float().to(torch.float8_e4m3fn)), rf"{UP}: weight._data.*optimum-quanto"),
    "quanto with a shift": ("quanto-int8", added(f"{UP}.weight._shift", torch.zeros(128, 1).half()), rf"{UP}: weight._shift.*optimum-quanto"),
    # what tensors say of themselves
    "shape of another": ("ct-4bit", tensor(f"{UP}.weight_shape", lambda t: t + 32), rf"{UP}"),
    "shape enormous": ("ct-4bit", tensor(f"{UP}.weight_shape", lambda t: t * 2**40), rf"{UP}: weight_shape"),
    "shape negative": ("ct-4bit", tensor(f"{UP}.weight_shape", lambda t: -t), rf"{UP}: weight_shape"),
    "shape of HQQ enormous": ("hqq-4bit", tensor(f"{UP}.shape", lambda t: t * 2**20), rf"{UP}"),
    "shape of HQQ beyond all": ("hqq-4bit", tensor(f"{UP}.shape", lambda t: t * 2**55), rf"{UP}"),
    "shape of HQQ turned": ("hqq-4bit", tensor("model.layers.0.self_attn.k_proj.shape", lambda t: t.flip(0)), "k_proj"),
    "group of HQQ zero": ("hqq-4bit", value(f"{UP}.group_size", 0), rf"{UP}: .*out of range"),
    "group of HQQ negative": ("hqq-4bit", value(f"{UP}.group_size", -64), rf"{UP}: .*out of range"),
    "bits of HQQ": ("hqq-4bit", value(f"{UP}.nbits", 5), rf"{UP}: .*out of range"),
    "bits of HQQ another": ("hqq-4bit", value(f"{UP}.nbits", 8), rf"{UP}: W_q has shape"),
    "axis of HQQ": ("hqq-4bit", value(f"{UP}.axis", 2), rf"{UP}: .*out of range"),
    "zero points of HQQ quantized again": ("hqq-4bit", value(f"{UP}.quant_zero", 1), rf"{UP}: .*quantized again"),
    "weight_format": (INT8, value(f"{UP}.weight_format", 1), rf"{UP}: weight_format \[1\]"),
    "quant_map of its own": (BNB, value(f"{UP}.weight.quant_map", 0.5), rf"{UP}: weight.quant_map: not the levels of nf4"),
    "state not JSON": (BNB, text(b"{"), rf"{UP}: .*no valid JSON"),
    "state nested too deep": (BNB, text(b"[" * 3000), rf"{UP}: .*no valid JSON"),
    "state too long": (BNB, text(b" " * 5000), rf"{UP}: .*5000 bytes"),
    "state a list": (BNB, text(b"[1]"), rf"{UP}: .*does not describe"),
    "state of another codebook": (BNB, state(quant_type="fp4"), rf"{UP}: .*does not describe"),
    "state of an enormous shape": (BNB, state(shape=[2**31, 2**31]), rf"{UP}: weight has shape"),
    "state of a negative shape": (BNB, state(shape=[-128, -128]), rf"{UP}: .*not that of a matrix"),
    "state of three axes": (BNB, state(shape=[2, 64, 128]), rf"{UP}: .*not that of a matrix"),
    "state of true": (BNB, state(shape=[True, 16384]), rf"{UP}: .*not that of a matrix"),
    "state without blocks": (BNB, state(blocksize=0), rf"{UP}: .*blocksize"),
    "state of enormous blocks": (BNB, state(blocksize=2**40), rf"{UP}: .*blocksize"),
    "state of a fraction": (BNB, state(blocksize=64.0), rf"{UP}: .*blocksize"),
    "state of nested blocks": (DOUBLE, state(nested_blocksize=-256), rf"{UP}: .*nested_blocksize"),
    "state of no offset": (DOUBLE, state(nested_offset=NAN), rf"{UP}: .*nested_offset"),
    "state missing": (BNB, gone(f"{UP}.weight.quant_state.bitsandbytes__nf4"), rf"{UP}: .*is missing"),
    # configurations
    **{f"bits {bits!r}": (GPTQ, said(bits=bits), r"quantization_config.bits") for bits in (0, -4, "4", True, [4], 4.0, 10**9, None, 5)},
    "bits of others": (GPTQ, said(bits=8), r"holds 4-bit zero points, quantization_config.bits is 8"),
    **{f"group_size {size!r}": (GPTQ, said(group_size=size), "group_size") for size in (0, -7, "128", True, 1e12, 10**12, NAN, [])},
    "group_size of others": (ASYM, said(group_size=64), r"scales has 4 groups, quantization_config.group_size is 64"),
    "sym a string": (GPTQ, said(sym="yes"), "quantization_config.sym"),
    "desc_act a number": (GPTQ, said(desc_act=1), "quantization_config.desc_act"),
    "another packing": (GPTQ, said(checkpoint_format="marlin"), "quantization_config.checkpoint_format 'marlin'"),
    "packing a list": (GPTQ, said(checkpoint_format=["gptq"]), "quantization_config.checkpoint_format"),
    "AWQ of another version": ("awq-gemm", said(version="marlin"), "quantization_config.version 'marlin'"),
    "AWQ of three bits": ("awq-gemm", said(bits=3), "quantization_config.bits"),
    "AWQ with a string of zero points": ("awq-gemm", said(zero_point="no"), "quantization_config.zero_point"),
    "AWQ in the layout of GEMV": ("awq-gemm", said(version="gemv"), UP.split(".up")[0]),
    "AutoRound in an unknown packing": ("auto-round", said(packing_format="auto_round:mlx"), "quant_method 'auto-round'"),
    "bitsandbytes of no bits": (BNB, said(load_in_4bit="yes"), "load_in_4bit"),
    "torchao of another tensor": ("torchao-int8", said(quant_type={"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}), "quant_type 'Int4WeightOnlyConfig'"),
    "torchao a string": ("torchao-int8", said(quant_type="int4_weight_only"), "quant_type"),
    "torchao of seven bits": ("torchao-int4-unpacked", said(quant_type={"default": {"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": {"_data": "int7"}}}}), "weight_dtype"),
    "bits in a group": ("ct-4bit", lambda _, c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=8), "weight_packed has shape"),
    "an unknown method": (GPTQ, said(quant_method="gptq3"), "gptq3"),
    # the model
    "a layer more": (GPTQ, copied(UP, "model.layers.7.mlp.up_proj"), r"layers\.7\.mlp\.up_proj: the model has no layer"),
    "a layer less": (GPTQ, gone(*(f"{UP}.{local}" for local in ("qweight", "qzeros", "scales", "g_idx"))), rf"{UP}.weight is missing"),
    "an expert less": (MOE, gone(*(f"{EXPERT}.{local}" for local in ("qweight", "qzeros", "scales", "g_idx"))), "5 matrices for the 3 experts"),
    "a tensor of one expert less": (MOE, gone(f"{EXPERT}.scales"), rf"{EXPERT}: scales is missing"),
    "an expert of another number": (MOE, renumbered("experts.2", "experts.7"), r"experts \[0, 1, 7\] instead of 0 to 2"),
    "a head tied to embeddings": ("gptq-4bit-lm-head", model(tie_word_embeddings=True), "lm_head is quantized, but config.json ties it to"),
    "another width": (GPTQ, model(intermediate_size=256), r"mlp.*has shape \[128, 128\], config.json says"),
    "a bias that the model has not": (GPTQ, added(f"{UP}.bias", torch.ones(128).half()), rf"tensor {UP}.bias: the layer has no bias"),
    "a norm of NaN": (GPTQ, value("model.norm.weight", NAN), "model.norm.weight.*NaN"),
    "a norm less": (GPTQ, gone("model.norm.weight"), "model.norm.weight"),
}  # fmt: skip
ONLY_LOADING = ("a layer less", "a norm less")  # what is not there cannot be checked without the model


def tampered(case: str, folder: Path) -> Path:
    fixture, change, _ = CASES[case]
    shutil.copytree(FIXTURES / fixture, folder, ignore=shutil.ignore_patterns("expected*"))
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peak() -> int:
    """The most memory that this process ever had, in bytes, since it was last asked to forget."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def forget() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Imports and caches are not the cost of a refusal."""
    for name in (GPTQ, MOE, BNB, "hqq-4bit", "ct-4bit", "awq-gemm"):
        hf_quant.load(str(FIXTURES / name))


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, tmp_path: Path) -> None:
    folder, said_ = tampered(case, tmp_path / "checkpoint"), CASES[case][2]
    size = sum(file.stat().st_size for file in folder.iterdir())
    knows = Path("/proc/self/status").exists() and forget()
    before = peak() if knows else 0
    with pytest.raises(HfQuantError) as caught:
        hf_quant.load(str(folder))
    if knows:
        assert peak() - before < BEYOND + size
    assert re.search(said_, str(caught.value)), str(caught.value)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
    if case not in ONLY_LOADING:
        with pytest.raises(HfQuantError):
            verify(folder)
