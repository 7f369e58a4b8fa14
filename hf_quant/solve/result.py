"""How a block is to be quantized, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.numerics import floored
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.solve.ranks import ALONE, Ranks
from hf_quant.solve.recipes import Decision


@dataclass(frozen=True)
class Recipe:
    """How the weights of a block become codes.

    Attributes:
        decision: For each scheme, what is done to the weights, stage by stage, and how codes are chosen.
        dtype: What scales are stored in.
        ranks: Who works on it.
    """

    decision: Decision
    dtype: torch.dtype
    ranks: Ranks = ALONE


@dataclass
class Solved:
    """What became of one block.

    Attributes:
        codes: Full name of each layer to its codes.
        errors: To the squared error of the layer's output over its squared output, on what it was asked to give.
        steps: Full name of each layer to the transforms that changed it, in order.
        notes: Of layers, stages and experts: what is worth reporting.
        error: Of the block's output likewise, all its layers quantized: beside the float block on the same inputs or,
            where the float model's activations are followed, beside those.
        experts: Full name of each stack to the tokens that each of its experts saw.
        starved: Full name of each stack to those experts that saw too few, and were rounded without them.
    """

    codes: dict[str, QuantizedTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    steps: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    error: float = 0.0
    experts: dict[str, list[int]] = field(default_factory=dict)
    starved: dict[str, list[int]] = field(default_factory=dict)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise of the block's output; None where there is no noise."""
        return -10 * math.log10(self.error) if self.error else None

    def record(self, block: str) -> dict[str, Any]:
        """For journal and recipe."""
        return {
            "block": block, "error": self.error, "sqnr_db": self.sqnr_db, "layers": self.errors, "steps": self.steps,
            "notes": self.notes, "experts": self.experts, "starved": self.starved,
        }  # fmt: skip

    def note(self, name: str, lines: Iterable[str]) -> None:
        """Remember ``lines`` about a layer."""
        new = [line for line in lines if line not in self.notes.get(name, [])]
        if new:
            self.notes.setdefault(name, []).extend(new)


def with_range(quantized: QuantizedTensor, peak: Tensor) -> QuantizedTensor:
    """The same with one scale for all activations, where its scheme wants that: the largest value seen becomes 127.

    Args:
        quantized: A layer.
        peak: ``[K]``, the largest magnitude of each of its inputs.
    """
    if quantized.scheme.activations != "tensor":
        return quantized
    if quantized.scheme.outlier_columns and quantized.outliers is not None:
        peak = peak.index_fill(0, quantized.outliers.index.long(), 0)
    return replace(
        quantized, input_scale=floored(peak.amax()[None] / 127, quantized.scale.dtype).to(quantized.scale.dtype)
    )
