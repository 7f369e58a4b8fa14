"""Checkpoints that other programs wrote, against what their own dequantizers give (``make_fixtures.py``)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.quantizers.base import HfQuantizer

import hf_quant
import hf_quant.errors
from hf_quant import HfQuantConfig
from hf_quant.checkpoint.contents import Contents, quantization_of
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.formats import conversion_targets, format_of
from hf_quant.jobs.convert import convert, open_quantized, targets
from hf_quant.jobs.verify import verify
from hf_quant.nn import QuantExperts, QuantLinear

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
if not hasattr(HfQuantizer, "get_new_dtype"):  # before 5.21 transformers casts such codes, and they are refused
    NAMES.remove("bnb-nf4-bf16-storage")
CAUSAL = tf.AutoModelForCausalLM
IDS = torch.arange(1, 17)[None]
# products in float16 are added up in another order than in the package's own model: permuted columns, Mixtral's experts
IN_FLOATS = [
    name for name in NAMES if "fp8" in name.split("-") or {"axis0", "mxfp8", "smoothquant"} & set(name.split("-"))
]
IN_FLOATS.remove("modelopt-nvfp4-fp8-inputs")
IN_ANOTHER_ORDER = [name for name in NAMES if "act-order" in name or "mixtral" in name]


def expected(name: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((FIXTURES / name / "expected.json").read_text())
    return made


def dtype_of(name: str) -> torch.dtype:
    made = getattr(torch, expected(name)["dtype"])
    assert isinstance(made, torch.dtype)
    return made


def loaded(path: Path | str, **kwargs: Any) -> Any:
    """Every weight has to come from the file, and every tensor of the file has to be used."""
    model, info = hf_quant.load(str(path), attn_implementation="eager", output_loading_info=True, **kwargs)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made = model(IDS).logits.float()
    assert isinstance(made, torch.Tensor)
    return made


def sha256(weight: torch.Tensor) -> str:
    raw = (weight + 0.0).contiguous().view(torch.uint8)  # no negative zeros
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_bit_for_bit_what_the_package_itself_dequantizes(name: str) -> None:
    contents, facts = open_quantized(FIXTURES / name), expected(name)
    assert set(contents.layers) == set(facts["layers"])
    for layer, weight in facts["layers"].items():
        read, dtype = contents.read(layer), getattr(torch, weight["dtype"])
        ours = read.dequantize(dtype) if isinstance(read, QuantizedTensor) else read.to(dtype)
        assert list(ours.shape) == weight["shape"] == list(contents.layers[layer].shape)
        assert sha256(ours) == weight["sha256"], layer


@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_what_the_float_model_with_those_weights_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = load_file(FIXTURES / name / "expected.safetensors")["logits"]
    monkeypatch.setenv("HF_QUANT_BACKEND", "reference")
    exact_inputs = HfQuantConfig(activations="float")  # the float model rounds none
    model = loaded(FIXTURES / name, dtype=dtype_of(name), quantization_config=exact_inputs)
    exact = logits(model)
    # made on another machine: what remains there is the order in which products are added up
    torch.testing.assert_close(exact, theirs, rtol=0, atol=1e-2 * float(theirs.abs().max()))
    packed = any(isinstance(m, (QuantLinear, QuantExperts)) for m in model.modules())
    assert packed == (name not in IN_FLOATS)
    if packed:
        twin = logits(model.dequantize())
        if name in IN_ANOTHER_ORDER or "moe" in name:  # transformers' own experts add up in another order too
            torch.testing.assert_close(exact, twin, rtol=0, atol=4e-3 * float(twin.abs().max()))
        else:
            assert torch.equal(exact, twin)


@pytest.mark.parametrize("name", NAMES)
def test_with_the_kernels_chosen_for_this_machine(name: str) -> None:
    theirs = load_file(FIXTURES / name / "expected.safetensors")["logits"]
    ours = logits(loaded(FIXTURES / name, dtype=torch.float32))
    # the packed int4 product rounds activations to bf16; and float32 does not round weights to float16 as they did
    # and layers that round their inputs to one stored scale lose more
    assert (ours - theirs).norm() / theirs.norm() < (0.1 if name in ("gemma-mobile", "modelopt-int8") else 0.05)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in IN_FLOATS])
def test_saved_by_us_it_loads_again_with_the_same_bits(name: str, tmp_path: Path) -> None:
    model = loaded(FIXTURES / name, dtype=dtype_of(name))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] in ("hf_quant", "compressed-tensors")
    again, info = CAUSAL.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(logits(again), logits(model))
    in_floats = {"hqq-4bit-mixtral": 1, "gemma-mobile": 2, "modelopt-int4-awq": 2}.get(name, 0)
    assert verify(tmp_path).layers_quantized == len(open_quantized(FIXTURES / name).layers) - in_floats


@pytest.mark.parametrize("name", NAMES)
def test_verify_finds_nothing_wrong(name: str) -> None:
    done = verify(FIXTURES / name)
    assert done.layers_quantized == len(expected(name)["layers"]) and done.format in name.replace(
        "ct-", "compressed_tensors"
    ) + (" gptq awq bitsandbytes")


@pytest.mark.parametrize("name", ["gptq-4bit", "bnb-nf4", "ct-fp8-tensor"])
def test_biases_of_quantized_layers_are_kept(name: str, tmp_path: Path) -> None:
    """As in Qwen2; and the zeros that AutoGPTQ wrote for layers without one are passed over."""
    shutil.copytree(FIXTURES / name, tmp_path / "q")
    tensors, config = (
        load_file(tmp_path / "q" / "model.safetensors"),
        json.loads((tmp_path / "q" / "config.json").read_text()),
    )
    sizes = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 128}
    biases = {f"model.layers.0.self_attn.{leaf}.bias": torch.randn(n).half() for leaf, n in sizes.items()}
    zeros = {"model.layers.0.mlp.up_proj.bias": torch.zeros(128).half()}
    save_file(tensors | biases | zeros, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    model = hf_quant.load(str(tmp_path / "q"), attn_implementation="eager", dtype=torch.float16)
    for bias, stored in biases.items():
        assert torch.equal(model.get_parameter(bias), stored)
    assert not torch.equal(logits(model), logits(loaded(FIXTURES / name, dtype=torch.float16)))
    if name.startswith("gptq"):
        convert(tmp_path / "q", tmp_path / "n", to="native")
        again = hf_quant.load(str(tmp_path / "n"), attn_implementation="eager", dtype=torch.float16)
        assert torch.equal(logits(again), logits(model))


# -- entrances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gptq-4bit", "awq-gemm", "ct-4bit-asym", "bnb-nf4", "hqq-4bit", "auto-round", "torchao-int8"]
)
def test_every_entrance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, method = (
        FIXTURES / name,
        json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]["quant_method"],
    )
    first = logits(loaded(folder))
    asked = CAUSAL.from_pretrained(folder, quantization_config=HfQuantConfig(), attn_implementation="eager")
    assert torch.equal(logits(asked), first)
    with pytest.raises(hf_quant.errors.PlanError, match="is quantized already"):
        CAUSAL.from_pretrained(folder, quantization_config=HfQuantConfig(bits=2), attn_implementation="eager")
    try:
        hf_quant.take_over(method)
        assert torch.equal(logits(CAUSAL.from_pretrained(folder, attn_implementation="eager")), first)
    finally:
        hf_quant.take_over()
    with pytest.raises(
        (ImportError, NameError, ValueError, RuntimeError)
    ):  # transformers' own road; never silently ours
        CAUSAL.from_pretrained(folder, attn_implementation="eager")
        raise RuntimeError("the package is installed here")


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "modelopt-fp8"])
def test_what_transformers_does_not_know_is_run_without_asking(name: str, tmp_path: Path) -> None:
    first = logits(loaded(FIXTURES / name))
    assert torch.equal(logits(CAUSAL.from_pretrained(FIXTURES / name, attn_implementation="eager")), first)
    asked = CAUSAL.from_pretrained(FIXTURES / name, quantization_config=HfQuantConfig(), attn_implementation="eager")
    assert torch.equal(logits(asked), first)
    shutil.copytree(FIXTURES / name, tmp_path / "q")  # older ones say it in hf_quant_config.json alone
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(loaded(tmp_path / "q")), first)


@pytest.mark.parametrize(
    ("name", "local", "tensor", "message"),
    [
        ("modelopt-nvfp4", "weight_scale_2", None, "weight_scale_2 is missing"),
        ("modelopt-nvfp4", "weight_scale_2", torch.zeros(()), "weight_scale_2: must be a finite number above zero"),
        ("modelopt-nvfp4", "weight_scale", torch.ones(128, 3).to(torch.float8_e4m3fn), "weight_scale has 3 groups"),
        ("modelopt-nvfp4", "svdquant_lora_a", torch.ones(4, 128), "two small matrices beside the codes"),
        ("modelopt-int8", "weight_scale", torch.ones(5), r"weight_scale has shape \[5\], expected \[128\]"),
        ("modelopt-int8", "input_scale", torch.zeros(()), "input_scale: must be a finite number above zero"),
        ("modelopt-int4-awq", "weight_scale", torch.ones(64, 1), r"weight_scale has shape \[64, 1\], expected \[128"),
        ("modelopt-int4-awq", "pre_quant_scale", torch.ones(5), r"pre_quant_scale has shape \[5\]"),
        ("modelopt-fp8", "weight_scale", torch.ones(5), "neither one scale, nor 128, nor one for 128 x 128"),
    ],
)
def test_damaged_layers_of_modelopt_are_refused(
    name: str, local: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    shutil.copytree(FIXTURES / name, tmp_path / "q")
    tensors, layer = load_file(tmp_path / "q" / "model.safetensors"), "model.layers.0.self_attn.q_proj"
    tensors.pop(f"{layer}.{local}", None)
    save_file(tensors | ({} if tensor is None else {f"{layer}.{local}": tensor}), tmp_path / "q" / "model.safetensors")
    with pytest.raises(hf_quant.errors.CheckpointError, match=message):
        contents = open_quantized(tmp_path / "q")
        contents.read(layer)


def test_scales_of_modelopt_in_16_bits_stay_so(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "modelopt-int8", tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if name.endswith("weight_scale")}
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    contents, name = open_quantized(tmp_path / "q"), "model.layers.0.mlp.up_proj"
    read = contents.read(name)
    assert isinstance(read, QuantizedTensor) and contents.layers[name].scale_dtype == torch.bfloat16
    assert torch.equal(read.scale.view(-1), tensors[f"{name}.weight_scale"])
    assert hf_quant.load(str(tmp_path / "q")).model.layers[0].mlp.up_proj.weight_scale.dtype == torch.bfloat16


def test_take_over_names_what_it_does_not_know() -> None:
    with pytest.raises(hf_quant.errors.HfQuantError, match="'gtpq' is not one of"):
        hf_quant.take_over("gptq", "gtpq")


def test_what_nobody_reads_is_said() -> None:
    with pytest.raises(hf_quant.errors.FormatError, match="quant_method 'gguf': no format reads it"):
        format_of({"quant_method": "gguf"})


# -- what it costs ------------------------------------------------------------------------------------------------


# embeddings of Gemma are held in floating point
@pytest.mark.parametrize("name", [n for n in NAMES if n not in (*IN_FLOATS, "gemma-mobile", "modelopt-int4-awq")])
def test_the_loaded_model_is_as_small_as_the_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_QUANT_BACKEND", "codebook" if "fp4" in name or "nf4" in name else "dequant")
    model = loaded(FIXTURES / name, dtype=dtype_of(name))
    file = sum(info.nbytes for info in Checkpoint.open(FIXTURES / name).tensors.values())
    wider = (
        sum(p.nbytes for p in model.parameters() if p.dtype is torch.float32) // 2
        if dtype_of(name) is torch.float32
        else 0
    )
    assert sum(p.nbytes for p in model.parameters()) - wider <= 1.1 * file


# -- conversion ---------------------------------------------------------------------------------------------------

HELD = {"gptq": ("gptq", "ct", "awq", "auto"), "awq": ("awq",), "dense": ("",)}


def codes_of(folder: Path) -> dict[str, list[torch.Tensor]]:
    """Codes in the order of the columns, scales, zero points, of every layer."""
    contents, made = open_quantized(folder), {}
    for layer in contents.layers:
        read = contents.read(layer)
        assert isinstance(read, QuantizedTensor)
        made[layer] = [read.codes(), read.scale, read.zeros()]
    return made


@pytest.mark.parametrize("name", ["gptq-4bit", "gptq-4bit-asym", "awq-gemm-moe", "auto-round-moe", "ct-4bit-asym"])
def test_a_round_trip_through_every_format_changes_nothing(name: str, tmp_path: Path) -> None:
    before, at = codes_of(FIXTURES / name), FIXTURES / name
    for i, to in enumerate(["native", "gptq", "compressed-tensors", "awq", "native", "compressed-tensors"]):
        convert(at, tmp_path / f"{i}-{to}", to=to)
        at = tmp_path / f"{i}-{to}"
        after = codes_of(at)
        assert after.keys() == before.keys()
        for layer in before:
            assert all(torch.equal(one, other) for one, other in zip(before[layer], after[layer], strict=True)), (
                to,
                layer,
            )
    direct = logits(loaded(FIXTURES / name, dtype=dtype_of(name)))
    assert torch.equal(logits(loaded(at, dtype=dtype_of(name))), direct)


@pytest.mark.parametrize("name", ["gptq-4bit-act-order-moe", "gptq-4bit-act-order-asym-v2", "ct-4bit-act-order"])
def test_reordered_columns_survive_gptq_and_native_and_are_refused_elsewhere(name: str, tmp_path: Path) -> None:
    before = open_quantized(FIXTURES / name)
    for to in ("native", "gptq"):
        convert(FIXTURES / name, tmp_path / to, to=to)
        after = open_quantized(tmp_path / to)
        for layer in before.layers:
            one, other = before.read(layer), after.read(layer)
            assert isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor)
            assert one.perm is not None and other.perm is not None and torch.equal(one.perm, other.perm)
            assert torch.equal(one.qweight, other.qweight) and torch.equal(one.scale, other.scale)
        assert torch.equal(logits(loaded(tmp_path / to)), logits(loaded(FIXTURES / name)))
    for to in ("awq", "compressed-tensors"):
        with pytest.raises(hf_quant.errors.FormatError, match="order"):
            convert(FIXTURES / name, tmp_path / to, to=to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("to", [to for to in targets() if to not in ("gguf", "mlx")])
def test_every_conversion_is_exact_or_refused_in_a_sentence(name: str, to: str, tmp_path: Path) -> None:
    try:
        done = convert(FIXTURES / name, tmp_path / "out", to=to)
    except hf_quant.errors.FormatError as error:
        assert to != "dense" and str(error).startswith(f"--to {to}: ") and len(str(error).split()) > 6
        assert not (tmp_path / "out").exists()
        return
    assert done.layers == len(expected(name)["layers"])
    if to == "dense":
        made = load_file(tmp_path / "out" / "model.safetensors")
        dtype = made["model.embed_tokens.weight"].dtype
        for layer, weight in expected(name)["layers"].items():
            dense = (
                made[layer].mT if layer in made else made[f"{layer}.weight"]
            )  # gpt-oss holds the transpose of a stack
            if getattr(torch, weight["dtype"]) == dtype == dense.dtype:
                assert sha256(dense) == weight["sha256"]
    else:
        kind = quantization_of(tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text()))
        assert (
            kind is not None
            and Contents.of(Checkpoint.open(tmp_path / "out"), kind).format == conversion_targets()[to]
        )


def test_shards_stay_shards(tmp_path: Path) -> None:
    model = loaded(FIXTURES / "gptq-4bit-moe")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    convert(tmp_path / "many", tmp_path / "gptq", to="gptq")
    names = {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "gptq").glob("*.safetensors")} == names
    assert verify(tmp_path / "gptq").layers_quantized == len(open_quantized(FIXTURES / "gptq-4bit-moe").layers)
    assert torch.equal(logits(loaded(tmp_path / "gptq")), logits(model))
