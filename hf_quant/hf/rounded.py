"""Layers of a plan that calibration does not reach: rounded to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import PlanError
from hf_quant.hf.plan import Plan
from hf_quant.solve.block import inside, parameter_in
from hf_quant.solve.result import Recipe
from hf_quant.solve.unseen import nearest

REASON = "outside of the blocks that a text runs through: rounded to nearest"


def outside(plan: Plan, chains: Sequence[Sequence[str]]) -> list[str]:
    """The layers of the plan that are in no block of ``chains``; the plan says so from now on.

    Raises:
        PlanError: One of them needs calibration.
    """
    blocks = tuple(inside(block) for chain in chains for block in chain)
    names = [name for name in plan.schemes if not name.startswith(blocks)]
    for name in names:
        if plan.schemes[name].activations == "tensor":
            raise PlanError(f"{name}: {REASON}, but one scale for all its inputs has to be calibrated: leave it out")
        plan.regrouped[name] = REASON
    return names


@torch.no_grad()
def rounded(model: Any, name: str, plan: Plan, recipe: Recipe) -> QuantizedTensor:
    """The codes of a layer, or of a stack of experts, in floating point in memory, which gets the values of the codes in float32."""
    parameter, geometry = parameter_in(model, name)
    codes = nearest(parameter, geometry, plan.schemes[name], recipe)
    parameter.data = geometry.weight(codes.dequantize(torch.float32)).contiguous()
    return codes
