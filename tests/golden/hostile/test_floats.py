"""Hostile tensors and configs of MXFP4 (of gpt-oss and of compressed-tensors), NVFP4, FP8 blocks, BitNet and Gemma: each is refused by a sentence that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_quant.errors import FormatError
from hf_quant.formats import format_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
LAYER = "model.layers.0.mlp.up_proj"
STACK = "model.layers.0.mlp.experts.gate_up_proj"
State = dict[str, torch.Tensor]


def layer_of(name: str) -> tuple[dict[str, Any], State]:
    """The config of a checkpoint, and the tensors of one layer."""
    stored = json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]
    tensors = load_file(FIXTURES / name / "model.safetensors")
    stack = {n.removeprefix(STACK): t for n, t in tensors.items() if n in (f"{STACK}_blocks", f"{STACK}_scales")}
    return stored, stack or {n.removeprefix(f"{LAYER}."): t for n, t in tensors.items() if n.startswith(f"{LAYER}.")}


def read(stored: dict[str, Any], state: State) -> torch.Tensor:
    _, fmt = format_of(stored)
    (found,) = fmt.layers({LAYER: state}, lambda full: state.get(full.removeprefix(f"{LAYER}."))).values()
    return fmt.dense(state) if found.scheme is None else fmt.read(state, found.scheme).dequantize(torch.float32)


def put(name: str, value: float, at: int = 0) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = state[name].clone()
        state[name].view(-1)[at] = value

    return change


def byte(name: str, value: int) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = state[name].clone()
        state[name].view(torch.uint8).view(-1)[0] = value

    return change


def made(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    return lambda state: state.__setitem__(name, change(state[name]))


def gone(name: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        del state[name]

    return change


def common(codes: str, scale: str) -> dict[str, tuple[Callable[[State], None], str]]:
    """What may be wrong with any layer of codes and scales."""
    return {
        "no codes": (gone(codes), codes),
        "no scales": (gone(scale), scale),
        "codes a row short": (made(codes, lambda t: t[:-1]), "shape"),
        "codes in one axis": (made(codes, torch.flatten), "shape"),
        "codes of another type": (made(codes, lambda t: t.view(torch.uint8).to(torch.int16)), "dtype|weight"),
        "no rows": (made(codes, lambda t: t[:0]), "shape"),
        "scales a row short": (made(scale, lambda t: t[:-1]), "shape|missing"),
        "three axes of scales": (made(scale, lambda t: t[None, None]), "shape"),
        "scales of another type": (made(scale, lambda t: torch.ones(t.shape, dtype=torch.int64)), "dtype"),
    }


FP4 = "weight_packed", "weight_scale"
CASES: dict[str, dict[str, tuple[Callable[[State], None], str]]] = {
    "gemma-mobile": common("weight", "weight_scale")
    | {
        "a scale that is NaN": (put("weight_scale", float("nan")), "weight_scale.*finite"),
        "scales that are all zero": (made("weight_scale", torch.zeros_like), "weight_scale.*zero"),
        "scales of two groups": (made("weight_scale", lambda t: t.repeat(1, 2)), "weight_scale.*shape"),
        "half the columns of a group": (made("weight", lambda t: t[:, :7]), "multiples of 32|shape"),
        "codes of 8 bits": (made("weight", lambda t: t.view(torch.int8)), "weight.*dtype"),
        "a range below zero": (put("input_activation_scale", -1.0), "input_activation_scale.*above zero"),
        "a range that is NaN": (put("input_activation_scale", float("nan")), "input_activation_scale.*above zero"),
        "two ranges": (made("input_activation_scale", lambda t: t.repeat(2)), "input_activation_scale.*one"),
        "a range in integers": (made("input_activation_scale", lambda t: t.to(torch.int64)), "input_activation_scale"),
    },
    "mxfp4-moe": common("_blocks", "_scales")
    | {
        "an exponent that is NaN": (put("_scales", 255), "_scales.*NaN"),
        "an expert without scales": (made("_scales", lambda t: t[1:]), "_scales.*shape"),
        "blocks of 8 bytes": (made("_blocks", lambda t: t[..., :8]), "_blocks.*shape"),
        "blocks side by side": (made("_blocks", lambda t: t.flatten(-2)), "_blocks.*shape"),
        "a scale for two blocks": (made("_scales", lambda t: t[..., ::2]), "_scales.*shape"),
        "no experts": (made("_blocks", lambda t: t[:0]), "shape"),
    },
    "ct-mxfp4": common(*FP4) | {
        "an exponent that is NaN": (byte("weight_scale", 255), "NaN"),
        "half the columns": (made("weight_packed", lambda t: t[:, : t.shape[1] // 2].contiguous()), "shape"),
        "columns that fill no group": (made("weight_packed", lambda t: t[:, :-3].contiguous()), "multiple of 32"),
    },
    "ct-nvfp4": common(*FP4) | {
        "an E4M3 scale that is NaN": (byte("weight_scale", 0x7F), "finite"),
        "no scale of all": (gone("weight_global_scale"), "weight_global_scale"),
        "a scale of all that is zero": (put("weight_global_scale", 0.0), "weight_global_scale"),
        "a scale of all that is NaN": (put("weight_global_scale", float("nan")), "weight_global_scale"),
        "two scales of all": (made("weight_global_scale", lambda t: t.repeat(2)), "weight_global_scale"),
    },
    "fp8-block": {case: one for case, one in common("weight", "weight_scale_inv").items() if case != "codes a row short"} | {
        "a weight that is NaN": (byte("weight", 0x7F), "NaN"),
        "a scale that is NaN": (put("weight_scale_inv", float("nan")), "finite"),
        "an infinite scale": (put("weight_scale_inv", float("inf")), "finite"),
        "scales that are all zero": (made("weight_scale_inv", torch.zeros_like), "zero"),
    },
    "bitnet": {case: one for case, one in common("weight", "weight_scale").items()
               if case not in ("codes a row short", "scales of another type", "scales a row short")} | {
        "a fourth code": (byte("weight", 0xC0), "ternary"),
        "a scale of zero": (put("weight_scale", 0.0), "zero|finite"),
        "a scale that is NaN": (put("weight_scale", float("nan")), "finite"),
        "two scales": (made("weight_scale", lambda t: t.repeat(2)), "one value"),
        "scales in integers": (made("weight_scale", lambda t: t.to(torch.int64)), "dtype"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_tensors(name: str, case: str) -> None:
    stored, state = layer_of(name)
    assert read(stored, state).isfinite().all()
    change, said = CASES[name][case]
    change(state)
    with pytest.raises(FormatError, match=said):
        read(stored, state)


CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "groups of 64": (
        "ct-mxfp4",
        lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=64),
        "32 .MXFP4. and 16",
    ),
    "groups of true": ("ct-mxfp4", lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=True), "32"),
    "another strategy": (
        "ct-nvfp4",
        lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="group"),
        "16",
    ),
    "zero points": (
        "ct-nvfp4",
        lambda c: c["config_groups"]["group_0"]["weights"].update(symmetric=False),
        "symmetric",
    ),
    "six bits": ("ct-mxfp4", lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=6), "format"),
    "another format": ("ct-mxfp4", lambda c: c.update(format="mxfp6-pack-quantized"), "format"),
    "a block of one size": ("fp8-block", lambda c: c.update(weight_block_size=[64]), "weight_block_size"),
    "a block of zero": ("fp8-block", lambda c: c.update(weight_block_size=[0, 64]), "weight_block_size"),
    "a block of text": ("fp8-block", lambda c: c.update(weight_block_size="64"), "weight_block_size"),
    "a block that does not fit": ("fp8-block", lambda c: c.update(weight_block_size=[32, 64]), "shape"),
    "exponents as scales": ("fp8-block", lambda c: c.update(scale_fmt="ue8m0"), "scale_fmt"),
    "experts in four bits": ("fp8-block", lambda c: c.update(expert_dtype="fp4"), "expert_dtype"),
    "another layer": ("bitnet", lambda c: c.update(linear_class="x"), "linear_class"),
    "rounded at run time": (
        "bitnet",
        lambda c: c.update(linear_class="autobitlinear", quantization_mode="online"),
        "quantization_mode",
    ),
    "three bits": ("gemma-mobile", lambda c: c.update(num_bits=3), "num_bits"),
    "patterns in a list": ("gemma-mobile", lambda c: c.update(module_quant_configs=["mlp"]), "module_quant_configs"),
    "a pattern without bits": ("gemma-mobile", lambda c: c.update(module_quant_configs={"mlp": 4}), "an object"),
    "a pattern of five bits": (
        "gemma-mobile",
        lambda c: c.update(module_quant_configs={"mlp": {"num_bits": 5}}),
        "num_bits",
    ),
    "a pattern that never ends": (
        "gemma-mobile",
        lambda c: c.update(module_quant_configs={"(m+)+$": {"num_bits": 4}}),
        "regular expressions",
    ),
    "digits side by side": (
        "gemma-mobile",
        lambda c: c.update(module_quant_configs={r"\d+\d+\d+$": {"num_bits": 4}}),
        "regular expressions",
    ),
    "many alternatives": (
        "gemma-mobile",
        lambda c: c.update(module_quant_configs={"(m|m)" * 30: {"num_bits": 4}}),
        "regular expressions",
    ),
    "an open bracket": (
        "gemma-mobile",
        lambda c: c.update(module_quant_configs={"(mlp": {"num_bits": 4}}),
        "module_quant_configs",
    ),
    "a norm inside": ("bitnet", lambda c: c.update(use_rms_norm=True), "use_rms_norm"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str) -> None:
    name, change, said = CONFIGS[case]
    stored, state = layer_of(name)
    change(stored)
    with pytest.raises(FormatError, match=said):
        read(stored, state)


def test_the_other_kind_of_layer_multiplies_by_its_scale() -> None:
    stored, state = layer_of("bitnet")
    divided, multiplied = read(stored, state), read(stored | {"linear_class": "autobitlinear"}, state)
    torch.testing.assert_close(divided * state["weight_scale"], multiplied / state["weight_scale"])
