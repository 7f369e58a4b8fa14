"""Scales in odd places: codes that mean other numbers than their program meant would be worse than any error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant.checkpoint.contents import Contents
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.errors import FormatError
from hf_quant.formats import format_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "name", ["gptq-4bit-act-order", "gptq-4bit-act-order-asym-v2", "ct-4bit-act-order", "gptq-4bit"]
)
def test_a_scale_of_zero_among_columns_in_another_order(name: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    contents = Contents.of(checkpoint, checkpoint.config["quantization_config"])
    tensors, scheme = contents.tensors(UP), contents.layers[UP].scheme
    assert scheme is not None and scheme.permuted == ("act-order" in name)
    before = contents.fmt.read(tensors, scheme).dequantize(torch.float32)
    scales = next(local for local in ("scales", "weight_scale") if local in tensors)
    axis = 0 if scales == "scales" else 1
    tensors[scales].select(axis, 0)[5] = 0
    order = tensors.get("g_idx", tensors.get("weight_g_idx"))
    group = (
        order
        if order is not None
        else torch.arange(before.shape[1]) // (before.shape[1] // tensors[scales].shape[axis])
    )
    expected = before.clone()
    expected[5, group == 0] = 0
    assert torch.equal(contents.fmt.read(tensors, scheme).dequantize(torch.float32), expected)


def floats(block: list[int] | None, targets: list[str]) -> dict[str, Any]:
    how = {"strategy": "block", "block_structure": block} if block else {"strategy": "channel"}
    return {
        "targets": targets,
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **how},
    }


def two_groups() -> Any:
    groups = {"a": floats([16, 32], ["Linear"]), "b": floats(None, ["b"])}
    return format_of({"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
                      "config_groups": groups, "ignore": [], "kv_cache_scheme": None})[1]  # fmt: skip


def test_two_groups_of_floats_are_told_apart_by_their_scales() -> None:
    weight = torch.randn(32, 64).to(torch.float8_e4m3fn)
    blocks, rows = torch.rand(2, 2) + 0.5, torch.rand(32, 1) + 0.5
    fmt = two_groups()
    wide = blocks.repeat_interleave(16, 0).repeat_interleave(32, 1)
    assert torch.equal(fmt.dense({"weight": weight, "weight_scale": blocks}), weight.float() * wide)
    assert torch.equal(fmt.dense({"weight": weight, "weight_scale": rows}), weight.float() * rows)
    layers = fmt.layers(
        {"a": {"weight": weight, "weight_scale": blocks}, "b": {"weight": weight, "weight_scale": rows}},
        lambda _: None,
    )
    assert {layer.note for layer in layers.values()} == {"8-bit floats"}
    for scales in (torch.ones(32, 3), torch.ones(1, 1, 1), torch.ones(2, 3)):
        with pytest.raises(FormatError, match="weight_scale has shape"):
            fmt.dense({"weight": weight, "weight_scale": scales})
    with pytest.raises(FormatError, match="b: weight_scale has shape"):
        fmt.layers({"b": {"weight": weight, "weight_scale": blocks}}, lambda _: None)
