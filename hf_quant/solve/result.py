"""How to quantize a block, and the result."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.numerics import floored, padded
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.solve.ranks import ALONE, Ranks
from hf_quant.solve.recipes import Decision


@dataclass(frozen=True)
class Recipe:
    """How the weights of a block are quantized.

    Attributes:
        decision: The transforms and the method for each scheme.
        dtype: The dtype of stored scales.
        ranks: The processes that work on it.
    """

    decision: Decision
    dtype: torch.dtype
    ranks: Ranks = ALONE


@dataclass
class Solved:
    """The result of one block.

    Attributes:
        codes: Full name of each layer to its codes.
        errors: Full name of each layer to the squared error of its output over its squared output, on calibration data.
        steps: Full name of each layer to the transforms that changed it, in order.
        notes: Remarks to report, by layer, stage or expert.
        error: Squared error over squared output of the whole block. The reference is the float block on the same inputs or, if the
            float model's hidden states are followed, on those.
        experts: Full name of each stack to the number of tokens of each expert.
        starved: Full name of each stack to the experts with too few tokens, which were rounded to nearest without data.
        offsets: Full name of each layer whose codes will be trained to how far its weights are from their codes
            (`hf_quant.solve.latent.offset_of`).
    """

    codes: dict[str, QuantizedTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    steps: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    error: float = 0.0
    experts: dict[str, list[int]] = field(default_factory=dict)
    starved: dict[str, list[int]] = field(default_factory=dict)
    offsets: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-quantization-noise ratio of the block's output; None without noise."""
        return -10 * math.log10(self.error) if self.error else None

    def record(self, block: str) -> dict[str, Any]:
        """For the journal and the recipe."""
        return {
            "block": block, "error": self.error, "sqnr_db": self.sqnr_db, "layers": self.errors, "steps": self.steps,
            "notes": self.notes, "experts": self.experts, "starved": self.starved,
        }  # fmt: skip

    def note(self, name: str, lines: Iterable[str]) -> None:
        """Add remarks about a layer."""
        new = [line for line in lines if line not in self.notes.get(name, [])]
        if new:
            self.notes.setdefault(name, []).extend(new)


def with_range(quantized: QuantizedTensor, peak: Tensor) -> QuantizedTensor:
    """``quantized`` with one scale for all activations, if its scheme has static activations.

    Args:
        quantized: A layer.
        peak: ``[K]``, the largest magnitude of each input; the largest of all maps to 127.
    """
    if quantized.scheme.activations != "tensor":
        return quantized
    if quantized.scheme.outlier_columns and quantized.outliers is not None:
        peak = padded(peak, quantized.scheme).index_fill(0, quantized.outliers.index.long(), 0)
    return replace(
        quantized, input_scale=floored(peak.amax()[None] / 127, quantized.scale.dtype).to(quantized.scale.dtype)
    )
