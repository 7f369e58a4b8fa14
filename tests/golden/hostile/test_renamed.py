"""Tensors under other names than the model's: transformers renames them, and no check may depend on the name in the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import hf_quant
from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.jobs.convert import convert
from hf_quant.jobs.verify import verify

UP = "model.layers.0.mlp.up_proj"
TINY = {
    "vocab_size": 48, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
BOTH = {"quantize_lm_head": True, "quantize_embeddings": True}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model in one scheme, written once in our own layout."""
    root, made = tmp_path_factory.mktemp("quantized"), {}

    def get(scheme: str, *, tied: bool = False, **how: Any) -> Path:
        key = (scheme, tied, *how)
        if key not in made:
            torch.manual_seed(0)
            base = root / f"base-{tied}"
            model = tf.AutoModelForCausalLM.from_config(
                tf.LlamaConfig(**TINY, tie_word_embeddings=tied), dtype=torch.bfloat16
            )
            model.save_pretrained(base)
            config = hf_quant.HfQuantConfig(scheme, format="native", **how)
            made[key] = root / str(len(made))
            tf.AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(made[key])
        return made[key]

    return get


def changed(folder: Path, out: Path, change: Callable[[Tensors], Any], **fields: Any) -> Path:
    """A copy whose tensors, or whose ``quantization_config``, are others."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= fields
    (out / "config.json").write_text(json.dumps(config))
    return out


def without_prefix(tensors: Tensors) -> None:
    """As a checkpoint of the base model names them; transformers adds the prefix again."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def filled(local: str, value: float) -> Callable[[Tensors], Any]:
    """All numbers of a tensor of one layer become one."""
    return lambda t: t.update({f"{UP}.{local}": torch.full_like(t[f"{UP}.{local}"], value)})


def with_range(value: float) -> Callable[[Tensors], Any]:
    """Every layer gets a scale of its inputs; that of one layer is ``value``."""

    def change(tensors: Tensors) -> None:
        layers = [name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")]
        tensors |= {f"{layer}_input_scale": torch.ones(1, dtype=torch.bfloat16) for layer in layers}
        tensors[f"{UP}.weight_input_scale"] = torch.tensor([value], dtype=torch.bfloat16)

    return change


ROWS, COLUMNS = "W3A16-g128-o1%", "W4A16-g128-o1%-columns"
HARMFUL: dict[str, tuple[str, str, Callable[[Tensors], Any]]] = {
    "columns beyond the end": (COLUMNS, "weight_outlier_index", filled("weight_outlier_index", 32767)),
    "columns before the start": (COLUMNS, "weight_outlier_index", filled("weight_outlier_index", -32768)),
    "outliers of rows beyond the end": (ROWS, "weight_outlier_index", filled("weight_outlier_index", 128)),
    "outliers of rows before the start": (ROWS, "weight_outlier_index", filled("weight_outlier_index", -1)),
    "scale NaN": ("W4A16-g32", "weight_scale", filled("weight_scale", float("nan"))),
    "scale zero": ("W4A16-g32", "weight_scale", filled("weight_scale", 0)),
    "scale beyond all numbers": ("W4A16-g32", "weight_scale", filled("weight_scale", 3e38)),
    "scale of the inputs zero": ("W8A8", "weight_input_scale", with_range(0)),
    "scale of the inputs negative": ("W8A8", "weight_input_scale", with_range(-1)),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_no_name_leads_around_a_check(case: str, quantized: Any, tmp_path: Path) -> None:
    scheme, said, change = HARMFUL[case]
    fields = {"scheme": "W8A8-static"} if scheme == "W8A8" else {}
    plain = changed(quantized(scheme), tmp_path / "plain", change, **fields)
    other = changed(plain, tmp_path / "other", without_prefix)
    match = rf"model\.safetensors: (model\.)?layers\.0\.mlp\.up_proj: {said}"
    for load in (
        lambda: tf.AutoModelForCausalLM.from_pretrained(plain),
        lambda: tf.AutoModel.from_pretrained(plain),
        lambda: tf.AutoModelForCausalLM.from_pretrained(other),
        lambda: verify(plain),
        lambda: verify(other),
    ):
        with pytest.raises(CheckpointError, match=match):
            load()


@pytest.mark.parametrize("scheme", [ROWS, "W4A16-g32"])
def test_what_is_sound_loads_under_every_name(scheme: str, quantized: Any, tmp_path: Path) -> None:
    folder = quantized(scheme, overrides={"*.q_proj": "W8A16-g32"})
    other = changed(folder, tmp_path / "other", without_prefix)
    whole = hf_quant.load(str(folder))
    for model in (hf_quant.load(str(other)), tf.AutoModel.from_pretrained(folder)):
        layers = getattr(model, "model", model).layers[0]
        expected = whole.model.layers[0]
        assert layers.self_attn.q_proj.scheme.bits == 8
        assert torch.equal(layers.mlp.up_proj.dequantize(), expected.mlp.up_proj.dequantize())
        assert torch.equal(layers.self_attn.q_proj.dequantize(), expected.self_attn.q_proj.dequantize())
    assert verify(other).layers_quantized == verify(folder).layers_quantized == 7


def test_one_layer_under_two_names(quantized: Any, tmp_path: Path) -> None:
    def twice(tensors: Tensors) -> None:
        tensors |= {name.removeprefix("model."): t.clone() for name, t in tensors.items() if UP in name}

    folder = changed(quantized("W4A16-g32"), tmp_path / "twice", twice)
    for way in (verify, tf.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="is the same layer of the model"):
            way(folder)


@pytest.mark.parametrize(
    "said", [{"format": "gptq"}, {"format": "compressed_tensors"}, {"overrides": {"*": "W8A16-g32"}}]
)
def test_no_field_switches_the_checks_off(said: dict[str, Any], quantized: Any, tmp_path: Path) -> None:
    folder = changed(quantized("W4A16-g32"), tmp_path / "said", filled("weight_scale", 0), **said)
    for way in (verify, tf.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(HfQuantError, match=r"weight_scale|format"):
            way(folder)


@pytest.mark.parametrize("method", [None, "fp8"])
def test_codes_are_never_taken_for_weights(method: str | None, quantized: Any, tmp_path: Path) -> None:
    folder = changed(quantized("W4A16-g32"), tmp_path / "codes", lambda t: t.update({
        name: t[name].view(torch.uint8).repeat(1, 2).view(128, -1)[:, :128] for name in t if name.endswith("proj.weight")
    }))  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method} if method else None
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    ways: list[Callable[[], Any]] = [lambda: verify(folder), lambda: hf_quant.load(str(folder))]
    if method is None:
        asked = hf_quant.HfQuantConfig("W4A16-g32")
        ways.append(lambda: tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked))
    for way in ways:
        with pytest.raises(HfQuantError, match="has dtype U8"):
            way()


@pytest.mark.parametrize("tied", [False, True])
def test_our_own_embeddings_and_tied_heads(tied: bool, quantized: Any, tmp_path: Path) -> None:
    folder = quantized("W4A16-g32", tied=tied, **BOTH)
    assert verify(folder).layers_quantized == (8 if tied else 9)
    convert(folder, tmp_path / "native", to="native")
    before, after = hf_quant.load(str(folder)), hf_quant.load(str(tmp_path / "native"))
    assert torch.equal(before.lm_head.dequantize(), after.lm_head.dequantize())
    assert torch.equal(before.model.embed_tokens.dequantize(), after.model.embed_tokens.dequantize())


def test_what_lies_on_disk_was_checked_too(quantized: Any, tmp_path: Path) -> None:
    folder = changed(quantized(COLUMNS), tmp_path / "far", filled("weight_outlier_index", 32767))
    places = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
    }
    with pytest.raises(CheckpointError, match="weight_outlier_index"):
        tf.AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk")
