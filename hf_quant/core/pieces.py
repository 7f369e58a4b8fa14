"""Parts of a quantized matrix, and matrices below each other: what engines need that split and fuse layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_quant.core.k_quants import COLUMNS
from hf_quant.core.scheme import MULTIPLE
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.errors import SchemeError


def rows_of(tensor: QuantizedTensor, start: int, count: int) -> QuantizedTensor:
    """``count`` rows of a matrix ``[N, K]`` from row ``start`` on.

    Raises:
        SchemeError: There are no such rows.
    """
    _check(start, count, tensor.qweight.shape[0], "rows")
    return rows_at(tensor, slice(start, start + count))


def rows_at(tensor: QuantizedTensor, rows: slice | Tensor) -> QuantizedTensor:
    """Some rows of a matrix ``[N, K]``, or all of them in another order: a slice, or their numbers, int64."""
    outliers = tensor.outliers
    if outliers is not None:
        index = outliers.index[rows] if outliers.index.ndim == 2 else outliers.index
        outliers = Outliers(index, outliers.value[rows])
    zero = None if tensor.zero_point is None else tensor.zero_point[rows]
    coded = None if tensor.coded is None else tensor.coded.mapped(lambda part: part[rows])
    return replace(
        tensor, qweight=tensor.qweight[rows], scale=tensor.scale[rows], zero_point=zero, outliers=outliers, coded=coded
    )


def columns_of(tensor: QuantizedTensor, start: int, count: int) -> QuantizedTensor:
    """``count`` columns of a matrix ``[N, K]`` from column ``start`` on.

    Rows of it may have another number of outliers than its scheme says; where they have different numbers of them, some outliers
    are zeros.

    Raises:
        SchemeError: There are no such columns, they cut a group, or the columns are stored in another order.
    """
    k = tensor.in_features
    _check(start, count, k, "columns")
    if tensor.scheme.padding:  # which only the last columns take along
        padding = tensor.scheme.padding if start + count == k else 0
        part = columns_of(tensor.stored, start, count + padding)
        return replace(part, scheme=replace(part.scheme, padding=padding))
    scheme = tensor.scheme
    if tensor.perm is not None:
        raise SchemeError(f"{scheme}: its columns are stored in another order and cannot be taken apart")
    unit = COLUMNS if scheme.blocks else MULTIPLE if scheme.group_size == -1 else max(MULTIPLE, scheme.group_size)
    if start % unit or count % unit:
        raise SchemeError(f"columns {start} to {start + count} of {k} cut what {scheme} holds in {unit} columns")
    scale, zero = tensor.scale, tensor.zero_point
    if scheme.group_size != -1:
        first, groups = start // scheme.group_size, count // scheme.group_size
        scale = scale[:, first : first + groups]
        zero = None if zero is None else zero[:, first : first + groups]
    bits = scheme.bits
    qweight = tensor.qweight[:, start * bits // 8 : (start + count) * bits // 8]
    outliers = None if tensor.outliers is None else _outliers_of(tensor.outliers, start, count)
    if outliers is None and scheme.outliers:
        scheme = replace(scheme, outliers=0.0, outlier_columns=False)
    coded = None
    if tensor.coded is not None:
        coded = tensor.coded.mapped(
            lambda p: p if p.shape[1] == 1 else p[:, start * p.shape[1] // k :][:, : count * p.shape[1] // k]
        )
    return replace(
        tensor, qweight=qweight, scale=scale, zero_point=zero, scheme=scheme, outliers=outliers, coded=coded
    )


def _outliers_of(outliers: Outliers, start: int, count: int) -> Outliers | None:
    """Those in a range of columns, counted from its start; None if there are none."""
    index, value = outliers.index.long() - start, outliers.value
    inside = (index >= 0) & (index < count)
    if not bool(inside.any()):
        return None
    if index.ndim == 1:
        return Outliers(index[inside].to(outliers.index.dtype), value[:, inside].contiguous())
    dense = value.new_zeros(value.shape[0], count + 1)  # the last column takes those outside
    held = torch.zeros(dense.shape, dtype=torch.bool, device=value.device)
    places = index.where(inside, torch.full_like(index, count))
    dense.scatter_(1, places, value)
    held.scatter_(1, places, True)
    most = int(inside.sum(1).max())
    # whoever has fewer takes free columns from the left, with zeros
    chosen = held[:, :count].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most].sort(1).values
    return Outliers(chosen.to(outliers.index.dtype), dense.gather(1, chosen))


def why_not_below(tensors: Sequence[QuantizedTensor]) -> str | None:
    """Why `below` cannot make one matrix of them; None if it can."""
    first = tensors[0]
    if any(tensor.scheme != first.scheme or tensor.in_features != first.in_features for tensor in tensors):
        return "they have different schemes or numbers of columns"
    if first.perm is not None or first.input_scale is not None or first.scheme.outlier_columns:
        return f"{first.scheme}: each has an order of columns, a scale of activations or outlier columns of its own"
    counts = {tensor.outliers.index.shape[1] for tensor in tensors if tensor.outliers is not None}
    return "their rows have different numbers of outliers" if len(counts) > 1 else None


def below(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One matrix with the rows of all of them, as fused projections have it.

    Raises:
        SchemeError: They do not fit together.
    """
    if (reason := why_not_below(tensors)) is not None:
        raise SchemeError(f"matrices below each other: {reason}")
    return QuantizedTensor.of_rows(iter(tensors), sum(tensor.qweight.shape[0] for tensor in tensors))


def _check(start: int, count: int, size: int, what: str) -> None:
    if start < 0 or count < 1 or start + count > size:
        raise SchemeError(f"{what} {start} to {start + count}: there are {size}")
