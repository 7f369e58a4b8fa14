"""Rounding to nearest: the start of every method, and the result that a method must improve on."""

from __future__ import annotations

from dataclasses import replace
from math import isnan
from typing import NamedTuple

import torch
from torch import Tensor

from hf_quant.core.grid import recovered
from hf_quant.core.layout import scale_dtype
from hf_quant.core.rounding import encode, search
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.methods._outliers import outlier_index, outlier_mask

CHUNK = (
    1 << 21
)  # weights searched together: limits the float32 working memory, where there is some, to a few tens of MB


def nearest(
    weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, steps: int, least: float,
    importance: Tensor | None = None, columns: Tensor | None = None,
) -> QuantizedTensor:  # fmt: skip
    """Round each weight to its nearest code, on the grid with the least squared error, or on the one that it lies on already.

    Args:
        weight: ``[N, K]``.
        scheme: Scheme of the codes.
        dtype: The dtype of stored scales.
        steps: Ranges tried for each group, from the full one down to ``least`` of it; 0 is plain min/max rounding.
        least: Smallest share of the range tried.
        importance: ``[K]``, mean square of each input; None without inputs.
        columns: int64 ``[C]``, the outlier columns; None to choose them here, if the scheme has some.
    """
    if scheme.outliers and scheme.outlier_columns and columns is None:  # shared by all rows
        columns = outlier_index(weight.float(), scheme, dtype, importance, steps, least, importance)

    def rows(part: Tensor) -> QuantizedTensor:
        index, outliers = columns, None
        if scheme.outliers:
            part = part.float()
            if index is None:
                index = outlier_index(part, scheme, dtype, importance, steps, least)
        if index is not None:
            outliers = Outliers.gather(part, index, dtype)
            part = part.masked_fill(outlier_mask(index, part.shape), 0)
        groups = part.unflatten(-1, (scheme.groups(part.shape[-1]), -1))  # [n, G, K/G]
        by_group = None if importance is None else importance.view(groups.shape[1], -1)
        scale, zero = search(groups, scheme, dtype, steps, least, by_group)
        if steps and not scheme.blocks and (grid := recovered(groups, scheme, dtype)) is not None:
            scale, zero = torch.where(grid[2], grid[0], scale), torch.where(grid[2], grid[1], zero)
        packed = encode(groups, scale, zero, scheme)
        return QuantizedTensor.of_packed(packed, scale.squeeze(-1).to(dtype), zero.squeeze(-1), scheme, outliers)

    n, k = weight.shape
    dtype = scale_dtype(scheme, dtype)
    return QuantizedTensor.of_rows(map(rows, weight.split(max(1, CHUNK // k))), n)


class Judged(NamedTuple):
    """A candidate, and the error of each of its rows on the inputs seen, float32 ``[N]``, and on held-out ones, float64 ``[N]``."""

    quantized: QuantizedTensor
    seen: Tensor
    held: Tensor


def best(
    weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, steps: int, least: float, stats: InputStats,
    columns: Tensor | None = None,
) -> Judged:  # fmt: skip
    """`nearest`, weighted by the importance of inputs or not, or plain min/max rounding: the one with the least error on the
    inputs seen."""
    importance = stats.importance.to(weight.device)
    weighed = nearest(weight, scheme, dtype, steps, least, importance, columns)
    if weighed.outliers is not None and scheme.outlier_columns:
        columns = weighed.outliers.index.long()
    searched, minmax = (
        nearest(weight, scheme, dtype, steps_tried, least, None, columns) for steps_tried in (steps, 0)
    )
    return better(*(judged(weight, stats, candidate) for candidate in (weighed, searched, minmax)))


def judged(weight: Tensor, stats: InputStats, quantized: QuantizedTensor) -> Judged:
    """With its errors, which are zeros without inputs."""
    real = quantized.dequantize(torch.float32)
    seen = (
        stats.row_errors(weight, real)
        if stats.rows
        else torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    )
    return Judged(quantized, seen, stats.held_errors(weight, real))


def better(tried: Judged, *others: Judged) -> Judged:
    """``tried``, with the rows of another candidate where those have less error; or another candidate with less error on held-out rows.

    All of them have the same outlier columns, if any.
    """
    chosen = tried
    for other in others:
        worse = ~(chosen.seen <= other.seen)
        if bool(worse.any()):
            chosen = Judged(
                _rows(worse, other.quantized, chosen.quantized), torch.where(worse, other.seen, chosen.seen),
                torch.where(worse, other.held, chosen.held),
            )  # fmt: skip
    held = [candidate.held.sum().item() for candidate in (chosen, *others)]
    return (chosen, *others)[min(range(len(held)), key=lambda i: (isnan(held[i]), held[i]))]


def _rows(use_second: Tensor, one: QuantizedTensor, other: QuantizedTensor) -> QuantizedTensor:
    """The rows of ``one`` where ``use_second [N]`` is true, and of ``other`` elsewhere."""

    def choose(first: Tensor, second: Tensor) -> Tensor:
        return torch.where(use_second[:, None], first, second)

    zero = None
    if one.zero_point is not None and other.zero_point is not None:
        zero = choose(one.zero_point, other.zero_point)
    outliers = other.outliers
    if one.outliers is not None and outliers is not None:
        index = outliers.index if outliers.index.ndim == 1 else choose(one.outliers.index, outliers.index)
        outliers = Outliers(index, choose(one.outliers.value, outliers.value))
    return replace(other, qweight=choose(one.qweight, other.qweight), scale=choose(one.scale, other.scale),
                   zero_point=zero, outliers=outliers)  # fmt: skip
