"""INT8 activations where no kernel multiplies them: rounded to their grid and back, then any kernel for the weights.

The same product in floating point: what integer kernels are compared with, and what runs everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import torch
from torch import Tensor

from hf_quant.core.numerics import quantize_rows
from hf_quant.core.scheme import THRESHOLD
from hf_quant.kernels._interface import P
from hf_quant.kernels._shared.blocks import Rounding, flat, rounding
from hf_quant.kernels._shared.ops import implements

if TYPE_CHECKING:
    from hf_quant.core.tensor import QuantizedTensor
    from hf_quant.kernels._interface import LinearBackend, LinearSpec


@implements("round_activations")
def round_activations(x: Tensor, columns: Tensor | None, scale: Tensor | None, threshold: float) -> Tensor:
    """``x [M, K]`` on the grid of its INT8 codes; gradients pass straight through.

    Args:
        x: ``[M, K]``.
        columns: int16 or int32 ``[C]``, left out: zeros, since they are added in floating point.
        scale: ``[1]``, or None for one of each row.
        threshold: Columns with a value that large stay as they are; 0 for none.
    """
    kept = x if columns is None else x.index_fill(1, columns.long(), 0)
    large = (kept.abs() >= threshold).any(0) if threshold else None
    codes, scales = quantize_rows(kept if large is None else kept.masked_fill(large, 0), scale)
    wrong = 0 if scale is None else 0 * kept  # a fixed scale would hide an infinity
    rounded = (codes * scales + wrong).to(x.dtype)
    return rounded if large is None else torch.where(large, x, rounded)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad, None, None, None


round_activations.register_autograd(_backward)


@dataclass(frozen=True, slots=True)
class RoundedWeight(Generic[P]):
    """A weight and the grid of its activations.

    Attributes:
        weight: What the backend inside reads.
        rounding: How the activations are rounded.
    """

    weight: P
    rounding: Rounding


@dataclass(frozen=True)
class RoundedViews(Generic[P]):
    """Around a backend that reads the portable codes."""

    inner: LinearBackend[P]
    priority: ClassVar[int] = 0
    repacks: ClassVar[bool] = False
    int8_activations: ClassVar[bool] = True

    def why_not(self, spec: LinearSpec) -> str | None:
        return self.inner.why_not(_plain(spec))

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> RoundedWeight[P]:
        return RoundedWeight(self.inner.prepare(weight, _plain(spec)), rounding(weight))

    def restore(self, prepared: RoundedWeight[P], spec: LinearSpec) -> Tensor:
        return self.inner.restore(prepared.weight, _plain(spec))

    def scales(self, prepared: RoundedWeight[P], spec: LinearSpec) -> dict[str, Tensor]:
        """See `LinearBackend`."""
        inner = getattr(self.inner, "scales", None)
        return {} if inner is None else inner(prepared.weight, _plain(spec))

    def linear(self, x: Tensor, prepared: RoundedWeight[P], spec: LinearSpec) -> Tensor:
        grid, threshold = prepared.rounding, THRESHOLD if spec.scheme.activations == "threshold" else 0.0
        rounded = round_activations(flat(x, spec.in_features), grid.columns, grid.scale, threshold)
        return self.inner.linear(rounded.view(x.shape), prepared.weight, _plain(spec))


class RoundedPacked(RoundedViews[P]):
    """Around one that has a layout of its own."""

    repacks: ClassVar[bool] = True


def _plain(spec: LinearSpec) -> LinearSpec:
    return replace(spec, scheme=spec.scheme.weights)
