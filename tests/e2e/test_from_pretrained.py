"""What a user may ask of ``from_pretrained``, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import attach_execution_device_hook, remove_hook_from_submodules
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.core.scheme import BITS
from hf_quant.errors import CheckpointError, FormatError, HfQuantError, PlanError, SchemeError
from hf_quant.hf.quantizer import HfQuantQuantizer
from hf_quant.nn import QuantEmbedding, QuantExperts, QuantLinear
from hf_quant.nn._repacking import Repacking

from .conftest import IDS

CAUSAL = AutoModelForCausalLM
G32 = HfQuantConfig("W4A16-g32")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


def quantized_names(model: Any) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_scheme(zoo: Any, tmp_path: Path, bits: int, group_size: int, symmetric: bool) -> None:
    folder = zoo("llama")[1]
    config = HfQuantConfig(bits=bits, group_size=group_size, symmetric=symmetric)
    model = CAUSAL.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path)
    again = hf_quant.load(str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[0].self_attn.q_proj.scheme.bits == bits


def test_a_dict_in_place_of_the_config(zoo: Any) -> None:
    config = {"quant_method": "hf_quant", "scheme": "W4A16-g32"}
    model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=config)
    assert str(model.model.layers[0].mlp.up_proj.scheme) == "W4A16-g32"


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}])
def test_device_maps(zoo: Any, device_map: Any) -> None:
    folder = zoo("llama")[1]
    model = CAUSAL.from_pretrained(folder, quantization_config=G32, device_map=device_map)
    plain = CAUSAL.from_pretrained(folder, quantization_config=G32)
    assert torch.equal(logits(model), logits(plain))


def test_disk_is_refused_while_quantizing_and_right_afterwards(zoo: Any, tmp_path: Path) -> None:
    folder = zoo("llama")[1]
    disk = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    disk |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(PlanError, match="disk"):
        CAUSAL.from_pretrained(folder, quantization_config=G32, device_map=disk, offload_folder=tmp_path / "off")
    model = CAUSAL.from_pretrained(folder, quantization_config=HfQuantConfig("W4A16-g32", format="native"))
    model.save_pretrained(tmp_path / "q")
    again = CAUSAL.from_pretrained(tmp_path / "q", device_map=disk, offload_folder=tmp_path / "off")
    torch.testing.assert_close(logits(again).float(), logits(model).float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_loaded_model_is_offloaded_by_accelerate(zoo: Any, tmp_path: Path, name: str, where: str) -> None:
    model = CAUSAL.from_pretrained(zoo(name)[1], quantization_config=G32, dtype=torch.float32)
    kernels = [module._backend for module in model.modules() if isinstance(module, Repacking)]
    assert any(kernel.repacks for kernel in kernels)
    before, state = logits(model), model.state_dict()
    if where == "disk":
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj._parameters["weight"].device.type == "meta"
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), before)
    assert kernels == [module._backend for module in model.modules() if isinstance(module, Repacking)]
    assert all(torch.equal(tensor, state[full]) for full, tensor in model.state_dict().items())


def test_a_hook_that_moves_no_weights_changes_no_kernel(zoo: Any) -> None:
    model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=G32)
    before, layer = logits(model), model.model.layers[0].self_attn.q_proj
    kernel = layer._backend
    attach_execution_device_hook(model, torch.device("cpu"))
    assert layer._backend is kernel and not layer.keeps_layout and layer._emptied("weight") == kernel.repacks
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "auto"])
def test_dtypes(zoo: Any, dtype: Any) -> None:
    model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=G32, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert logits(model).dtype == expected
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == expected


def test_moving_and_casting_a_loaded_model(zoo: Any) -> None:
    model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=G32, dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.dequantize()
    model.to("cpu")
    assert torch.equal(layer.dequantize(), before)
    assert logits(model).isfinite().all()


def test_overrides_by_glob_and_modules_left_alone(zoo: Any, tmp_path: Path) -> None:
    config = HfQuantConfig(
        "W4A16-g32",
        overrides={"*.down_proj": "W8A16-g32", "model.layers.1.mlp.up_proj": None},
        modules_to_not_convert=["q_proj", "model.layers.1.self_attn.k_proj"],
    )
    model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=config)
    layers = model.model.layers
    assert str(layers[1].mlp.down_proj.scheme) == "W8A16-g32"
    assert str(layers[0].mlp.up_proj.scheme) == "W4A16-g32"
    for left in (layers[0].self_attn.q_proj, layers[1].self_attn.k_proj, layers[1].mlp.up_proj, model.lm_head):
        assert type(left) is nn.Linear
    plan = model.hf_quantizer.plan
    assert plan.left["model.layers.1.mlp.up_proj"] == "as asked" and "head" in plan.left["lm_head"]
    model.save_pretrained(tmp_path)
    again = hf_quant.load(str(tmp_path))
    assert quantized_names(again) == quantized_names(model)
    assert torch.equal(logits(again), logits(model))


def test_a_group_size_that_does_not_divide_is_made_smaller_and_said(zoo: Any) -> None:
    model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=HfQuantConfig("W4A16-g64"))
    plan = model.hf_quantizer.plan
    assert str(plan.schemes["model.layers.0.mlp.down_proj"]) == "W4A16-g32"  # in_features 96
    assert "64 does not divide" in plan.regrouped["model.layers.0.mlp.down_proj"]
    assert "group size 32" in plan.summary()


def test_share_is_stored(zoo: Any, tmp_path: Path) -> None:
    for fmt in ("native", "compressed_tensors"):
        model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=HfQuantConfig("W4A16-g32", format=fmt))
        share = model.hf_quantizer.plan.share
        linears = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
        assert share == pytest.approx(linears / CAUSAL.from_pretrained(zoo("llama")[1]).num_parameters())
        model.save_pretrained(tmp_path / fmt)
        stored = json.loads((tmp_path / fmt / "config.json").read_text())["quantization_config"]
        assert stored.get("hf_quant", stored)["share_quantized"] == round(share, 4)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("ask", ["quantize_lm_head", "quantize_embeddings", "both"])
def test_head_and_embeddings_on_request(zoo: Any, tmp_path: Path, name: str, ask: str) -> None:
    flags = {key: True for key in ("quantize_lm_head", "quantize_embeddings") if ask in (key, "both")}
    model = CAUSAL.from_pretrained(zoo(name)[1], quantization_config=HfQuantConfig("W8A16-g32", **flags))
    tied = name == "llama-tied"
    assert isinstance(model.lm_head, QuantLinear) == (tied or ask != "quantize_embeddings")
    assert isinstance(model.model.embed_tokens, QuantEmbedding) == (tied or ask != "quantize_lm_head")
    if tied:
        assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale, "one table, not two"
    model.save_pretrained(tmp_path)
    assert any("lm_head" in key for key in load_file(tmp_path / "model.safetensors")) != tied
    again, info = hf_quant.load(str(tmp_path), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again), logits(model))
    base = logits(CAUSAL.from_pretrained(zoo(name)[1])).float()
    assert (logits(model).float() - base).norm() / base.norm() < 0.05


def test_an_untied_head_by_override(zoo: Any) -> None:
    config = HfQuantConfig("W4A16-g32", overrides={"lm_head": "W8A16-g-1"})
    model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=config)
    assert str(model.lm_head.scheme) == "W8A16-g-1"


def test_vision_tower_is_left_unless_named(zoo: Any) -> None:
    arch, folder = zoo("llava")
    model = arch.auto.from_pretrained(folder, quantization_config=G32)
    assert quantized_names(model) and all("language_model" in n for n in quantized_names(model))
    assert all("modality" in r for n, r in model.hf_quantizer.plan.left.items() if "vision" in n)
    named = HfQuantConfig("W4A16-g32", overrides={"*vision_tower*.fc1": "W8A16-g32"})
    model = arch.auto.from_pretrained(folder, quantization_config=named)
    assert any("vision" in n for n in quantized_names(model))


def test_experts_are_quantized_and_routers_left(zoo: Any) -> None:
    model = CAUSAL.from_pretrained(zoo("gpt-oss")[1], quantization_config=G32)
    experts = [m for m in model.modules() if isinstance(m, QuantExperts)]
    assert experts and all(set(m.schemes) == {"gate_up_proj", "down_proj"} for m in experts)
    assert all(m._parameters["gate_up_proj"].dtype == torch.uint8 for m in experts)
    assert model.hf_quantizer.plan.format == "native"


def test_compressed_tensors_layout_comes_back_through_every_entrance(zoo: Any, tmp_path: Path) -> None:
    model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=HfQuantConfig("W4A16-g32-asym"))
    assert model.hf_quantizer.plan.format == "compressed_tensors"
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "compressed-tensors" and stored["format"] == "pack-quantized"
    for again in (
        hf_quant.load(str(tmp_path)),
        CAUSAL.from_pretrained(tmp_path),
        CAUSAL.from_pretrained(tmp_path, quantization_config=HfQuantConfig()),
    ):
        assert isinstance(again.model.layers[0].mlp.up_proj, QuantLinear)
        assert torch.equal(logits(again), logits(model))


def test_generate_and_compile(zoo: Any) -> None:
    model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=G32)
    out = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, IDS.shape[1] + 5)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, logits(model), atol=2e-2, rtol=2e-2)


def test_a_new_process_gives_the_same_bits(zoo: Any, tmp_path: Path) -> None:
    model = CAUSAL.from_pretrained(zoo("qwen3")[1], quantization_config=HfQuantConfig("W3A16-g32"))
    model.save_pretrained(tmp_path / "q")
    save_file({"logits": logits(model)}, tmp_path / "logits.safetensors")
    code = (
        "import torch, hf_quant; from safetensors.torch import load_file\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"m = hf_quant.load({str(tmp_path / 'q')!r})\n"
        "y = m(torch.arange(1, 17)[None]).logits\n"
        f"assert torch.equal(y, load_file({str(tmp_path / 'logits.safetensors')!r})['logits'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stock_transformers_refuses_a_native_checkpoint(zoo: Any, tmp_path: Path) -> None:
    """Without the plug-in the load must fail, not warn and run on random weights."""
    for slug in ("W8A16-g32", "W4A16-g32", "W2A16-g32"):
        model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=HfQuantConfig(slug, format="native"))
        model.save_pretrained(tmp_path / slug)
        code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / slug)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=_env(HF_QUANT_AUTOLOAD="0")
        )
        assert done.returncode != 0 and "ignore_mismatched_sizes" in done.stderr


def _env(**extra: str) -> dict[str, str]:
    import os

    return os.environ | extra


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"bits": 9}, SchemeError, "bits must be one of"),
        ({"bits": True}, SchemeError, "bits"),
        ({"bits": "4"}, SchemeError, "bits"),
        ({"group_size": 48}, SchemeError, "group_size"),
        ({"group_size": 0}, SchemeError, "group_size"),
        ({"group_size": 32.0}, SchemeError, "group_size"),
        ({"symmetric": 1}, SchemeError, "symmetric"),
        ({"scheme": "W4"}, SchemeError, "W4"),
        ({"scheme": "W9A16-g32"}, SchemeError, "bits"),
        ({"method": "magic"}, PlanError, "method"),
        ({"format": "magic"}, PlanError, "format"),
        ({"format": "../native"}, PlanError, "format"),
        ({"version": 2}, FormatError, "version"),
        ({"version": "1"}, FormatError, "version"),
        ({"overrides": ["a"]}, PlanError, "overrides"),
        ({"overrides": {"a": "W9"}}, SchemeError, r"overrides\['a'\]"),
        ({"overrides": {"a": 4}}, SchemeError, "overrides"),
        ({"modules_to_not_convert": "lm_head"}, PlanError, "modules_to_not_convert"),
        ({"modules_to_not_convert": [3]}, PlanError, "modules_to_not_convert"),
    ],
)
def test_impossible_configs(fields: dict[str, Any], error: type[HfQuantError], said: str) -> None:
    with pytest.raises(error, match=said):
        HfQuantConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"overrides": {"*.down_porj": "W8A16-g32"}}, "down_proj"),
        ({"modules_to_not_convert": ["nothing_like_it"]}, "nothing_like_it"),
        ({"modules_to_not_convert": ["re:.*q_proj"]}, r"matches no module; it takes globs: '\*q_proj'"),
        ({"modules_to_not_convert": ["*"]}, "nothing to quantize"),
        ({"bits": 4, "format": "compressed_tensors", "quantize_embeddings": True}, "compressed_tensors"),
    ],
)
def test_plans_that_cannot_be(zoo: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=HfQuantConfig(group_size=32, **fields))


def saved(zoo: Any, out: Path, fmt: str = "native", **kwargs: Any) -> Path:
    model = CAUSAL.from_pretrained(
        zoo("llama")[1], quantization_config=HfQuantConfig("W4A16-g32-asym", format=fmt), **kwargs
    )
    model.save_pretrained(out)
    return out


UP = "model.layers.0.mlp.up_proj"


def _tamper(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


TAMPERED = {
    "scale_nan": (lambda t: t[f"{UP}.weight_scale"].view(-1)[3:4].fill_(float("nan")), "weight_scale"),
    "scale_inf": (lambda t: t[f"{UP}.weight_scale"].view(-1)[3:4].fill_(float("inf")), "weight_scale"),
    "scale_zero": (lambda t: t[f"{UP}.weight_scale"].view(-1)[3:4].fill_(0), "weight_scale"),
    "zero_point": (
        lambda t: t.update({f"{UP}.weight_zero_point": t[f"{UP}.weight_zero_point"][1:].clone()}),
        "weight_zero_point",
    ),
    "no_scale": (lambda t: t.pop(f"{UP}.weight_scale"), "weight_scale"),
    "no_codes": (lambda t: t.pop(f"{UP}.weight"), f"{UP}: weight is missing"),
    "no_layer": (lambda t: [t.pop(k) for k in list(t) if k.startswith(UP)], UP),
    "no_norm": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "norm_nan": (lambda t: t["model.norm.weight"][:1].fill_(float("nan")), "model.norm.weight"),
    "codes_shape": (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:, :-4].contiguous()}), f"{UP}: weight"),
    "codes_float": (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].float()}), f"{UP}: weight"),
}


@pytest.mark.parametrize("case", list(TAMPERED))
def test_damaged_native_checkpoints(zoo: Any, tmp_path: Path, case: str) -> None:
    change, said = TAMPERED[case]
    folder = saved(zoo, tmp_path / "q")
    _tamper(folder, change)
    with pytest.raises(HfQuantError, match=said.replace(".", r"\.")):
        CAUSAL.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_float_checkpoint_with_nan_weights(zoo: Any, tmp_path: Path, name: str, value: float) -> None:
    model = CAUSAL.from_pretrained(zoo(name)[1])
    part = model.model.layers[1].mlp
    weight = part.up_proj.weight if name == "llama" else part.experts.down_proj
    with torch.no_grad():
        weight.view(-1)[7] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp.*NaN or infinite"):
        CAUSAL.from_pretrained(tmp_path, quantization_config=G32)


def test_a_float_checkpoint_whose_shapes_contradict_its_config(zoo: Any, tmp_path: Path) -> None:
    CAUSAL.from_pretrained(zoo("llama")[1]).save_pretrained(tmp_path)
    _tamper(tmp_path, lambda t: t.update({f"{UP}.weight": torch.zeros(95, 64, dtype=torch.bfloat16)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*\[95, 64\]"):
        CAUSAL.from_pretrained(tmp_path, quantization_config=G32)


def test_a_float_checkpoint_with_a_missing_weight(zoo: Any, tmp_path: Path) -> None:
    CAUSAL.from_pretrained(zoo("llama")[1]).save_pretrained(tmp_path)
    _tamper(tmp_path, lambda t: t.pop(f"{UP}.weight"))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is missing"):
        CAUSAL.from_pretrained(tmp_path, quantization_config=G32)


def test_a_quantized_checkpoint_of_another_shape_than_its_config(zoo: Any, tmp_path: Path) -> None:
    folder = saved(zoo, tmp_path / "q")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match="proj"):
        CAUSAL.from_pretrained(folder)


def test_a_newer_version_is_refused_not_guessed_at(zoo: Any, tmp_path: Path) -> None:
    folder = saved(zoo, tmp_path / "q")
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    stored["quantization_config"]["version"] = 99
    path.write_text(json.dumps(stored))
    with pytest.raises(FormatError, match="99"):
        CAUSAL.from_pretrained(folder)


def test_an_index_that_leaves_the_folder(zoo: Any, tmp_path: Path) -> None:
    model = CAUSAL.from_pretrained(zoo("llama")[1])
    model.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = sorted(set(content["weight_map"].values()))[0]
    (tmp_path / "m" / shard).rename(tmp_path / "secret.safetensors")
    for entry in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        moved = {k: entry if v == shard else v for k, v in content["weight_map"].items()}
        index.write_text(json.dumps(content | {"weight_map": moved}))
        with pytest.raises(CheckpointError, match="secret"):
            CAUSAL.from_pretrained(tmp_path / "m", quantization_config=G32)


def test_truncated_file(zoo: Any, tmp_path: Path) -> None:
    folder = saved(zoo, tmp_path / "q")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        CAUSAL.from_pretrained(folder)


def test_load_of_an_unknown_architecture(zoo: Any, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(zoo("llama")[1])
    config.architectures = ["NoSuchModel"]
    with pytest.raises(CheckpointError, match="NoSuchModel"):
        hf_quant.load(str(zoo("llama")[1]), config=config)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("llama", {"quantize_embeddings": True}, "embed_tokens: calibrated methods leave embeddings"),
        ("llama", {"calibration": ["a text"]}, "no tokenizer beside the model"),
        ("llama", {"calibration": [{"pixel_values": torch.ones(1, 3, 4, 4)}] * 2}, "takes no pixel_values"),
        ("mixtral", {"training": True, "calibration": IDS.repeat(2, 1)}, "stacked experts begin from plain rounding"),
    ],
)
def test_what_the_plan_and_the_data_say_is_said_before_weights_are_read(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, name: str, fields: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(HfQuantQuantizer, "_process_model_after_weight_loading", None)
    with pytest.raises(HfQuantError, match=said):
        CAUSAL.from_pretrained(zoo(name)[1], quantization_config=HfQuantConfig("W8A16-g32", method="gptq", **fields))


@pytest.mark.parametrize("fmt", ["native", "compressed_tensors"])
def test_a_new_head_on_a_quantized_base(zoo: Any, tmp_path: Path, fmt: str) -> None:
    config = HfQuantConfig("W4A16-g32", format=fmt, quantize_lm_head=fmt == "native")
    model = CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=config)
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForSequenceClassification, AutoModel):
        other = auto.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(other.base_model(IDS)[0], model.model(IDS)[0])
    _tamper(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.startswith("lm_head")])
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        CAUSAL.from_pretrained(tmp_path)
    _tamper(tmp_path, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
