"""Rounding to nearest: what every method starts from, and what it must not lose to."""

from __future__ import annotations

from dataclasses import replace
from math import isnan

import torch
from torch import Tensor

from hf_quant.core.numerics import quantize, search
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.methods._outliers import outlier_index, outlier_mask

CHUNK = 1 << 20  # weights searched together: bounds the float32 working memory to a few tens of MB


def nearest(
    weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, steps: int, least: float,
    importance: Tensor | None = None, columns: Tensor | None = None,
) -> QuantizedTensor:  # fmt: skip
    """Each weight goes to its nearest code, on the grid with the least squared error.

    Args:
        weight: ``[N, K]``.
        scheme: Of the codes.
        dtype: What scales are stored in.
        steps: Ranges tried per group, from the full one down to ``least`` of it; 0 is plain min/max rounding.
        least: Smallest share of the range tried.
        importance: ``[K]``, the mean square of each input; None where none was seen.
        columns: int64 ``[C]``, the outlier columns; None: they are chosen here, where the scheme has some.
    """
    if scheme.outliers and scheme.outlier_columns and columns is None:  # all rows share them
        columns = outlier_index(weight.float(), scheme, dtype, importance, steps, least, importance)

    def rows(part: Tensor) -> QuantizedTensor:
        wide, index, outliers = part.float(), columns, None
        if scheme.outliers and index is None:
            index = outlier_index(wide, scheme, dtype, importance, steps, least)
        if index is not None:
            outliers = Outliers.gather(wide, index, dtype)
            wide = wide.masked_fill(outlier_mask(index, wide.shape), 0)
        groups = wide.unflatten(-1, (scheme.groups(wide.shape[-1]), -1))  # [n, G, K/G]
        by_group = None if importance is None else importance.view(groups.shape[1], -1)
        scale, zero = search(groups, scheme, dtype, steps, least, by_group)
        codes = quantize(groups, scale, zero, scheme.qmax).to(torch.uint8).flatten(-2)
        return QuantizedTensor.from_codes(codes, scale.squeeze(-1).to(dtype), zero.squeeze(-1), scheme, outliers)

    n, k = weight.shape
    return QuantizedTensor.of_rows(map(rows, weight.split(max(1, CHUNK // k))), n)


def best(
    weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, steps: int, least: float, stats: InputStats,
    columns: Tensor | None = None,
) -> QuantizedTensor:  # fmt: skip
    """`nearest`, with the inputs' importance where that loses least on the inputs seen; without it, or with plain min/max
    rounding, elsewhere."""
    importance = stats.importance.to(weight.device)
    weighed = nearest(weight, scheme, dtype, steps, least, importance, columns)
    if weighed.outliers is not None and scheme.outlier_columns:
        columns = weighed.outliers.index.long()
    searched, minmax = (nearest(weight, scheme, dtype, each, least, None, columns) for each in (steps, 0))
    return better(weight, stats, weighed, searched, minmax)


def better(weight: Tensor, stats: InputStats, tried: QuantizedTensor, *others: QuantizedTensor) -> QuantizedTensor:
    """``tried``, but for the rows that lose more than those of another; all of another if it wins on the rows held out.

    All have the same outlier columns, if any.
    """
    if not stats.rows:
        return tried
    kept, lost = tried, stats.row_errors(weight, tried.dequantize(torch.float32))
    for other in others:
        errors = stats.row_errors(weight, other.dequantize(torch.float32))
        worse = ~(lost <= errors)
        if bool(worse.any()):
            kept, lost = _rows(worse, other, kept), torch.where(worse, errors, lost)
    if not stats.held:
        return kept
    held = {i: stats.held_error(weight, each.dequantize(torch.float32)) for i, each in enumerate((kept, *others))}
    return (kept, *others)[min(held, key=lambda i: (isnan(held[i]), held[i]))]


def _rows(here: Tensor, one: QuantizedTensor, other: QuantizedTensor) -> QuantizedTensor:
    """The rows of ``one`` where ``here [N]`` says so, else of ``other``."""

    def choose(first: Tensor, second: Tensor) -> Tensor:
        return torch.where(here[:, None], first, second)

    zero = None
    if one.zero_point is not None and other.zero_point is not None:
        zero = choose(one.zero_point, other.zero_point)
    outliers = other.outliers
    if one.outliers is not None and outliers is not None:
        index = outliers.index if outliers.index.ndim == 1 else choose(one.outliers.index, outliers.index)
        outliers = Outliers(index, choose(one.outliers.value, outliers.value))
    return replace(other, qweight=choose(one.qweight, other.qweight), scale=choose(one.scale, other.scale),
                   zero_point=zero, outliers=outliers)  # fmt: skip
