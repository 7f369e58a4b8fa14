"""Layers that no token of the calibration text reaches: rounded to nearest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_quant.core.geometry import Geometry
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import HfQuantError
from hf_quant.methods import quantize
from hf_quant.solve.block import Block, parameter_of, put
from hf_quant.solve.inputs import Group
from hf_quant.solve.result import Recipe, Solved


def round_unseen(block: Block, groups: Iterable[Group], recipe: Recipe, solved: Solved) -> None:
    """Round the layers of a block that are in no group, and say so.

    Raises:
        HfQuantError: No layer of the block saw a token, or one needs to have seen some; names it.
    """
    seen = {block.full(local) for group in groups for local in group.layers}
    for name, scheme in block.layers.items():
        if name in seen:
            continue
        if not seen or scheme.activations == "tensor":
            raise HfQuantError(f"{name} saw no tokens")
        solved.codes[name] = nearest(*parameter_of(block, name), scheme, recipe)
        solved.errors[name] = 0.0
        solved.note(name, ["saw no tokens: rounded to nearest"])
        put(block, name, solved.codes[name].dequantize(torch.float32))


def nearest(parameter: Tensor, geometry: Geometry, scheme: QuantScheme, recipe: Recipe) -> QuantizedTensor:
    """The codes of a weight, or of a stack of experts, without data."""
    solver = recipe.decision.without_data()
    weight = geometry.matrix(parameter.float()).contiguous()
    if weight.ndim == 3:
        return QuantizedTensor.stack([quantize(solver, expert, scheme, recipe.dtype) for expert in weight])
    return quantize(solver, weight, scheme, recipe.dtype)
