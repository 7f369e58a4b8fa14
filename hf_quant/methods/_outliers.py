"""Chooses the weights that stay in floating point: those that save the most error, not the largest ones."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_quant.core.numerics import dequantize, quantize
from hf_quant.core.rounding import search
from hf_quant.core.scheme import QuantScheme


def outlier_index(
    weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, importance: Tensor | None, steps: int, least: float,
    inputs: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Indices of the outliers, int64 ``[C]`` or ``[N, R]``, ascending; None if the scheme has none.

    The cost of a weight is its error on the grid that fits the other weights: a large weight widens the grid of its whole group,
    so its error on that wider grid would mean nothing. Where activations are rounded too, columns are chosen by their inputs, as
    in LLM.int8 (arXiv:2208.07339): a large input widens the grid of all others in its row.

    Args:
        weight: float32 ``[N, K]``.
        scheme: How many, and of which kind.
        dtype: What scales are stored in.
        importance: ``[K]``, cost of an error in each column; None for equal costs.
        steps: Ranges tried for the grid.
        least: Smallest share of the range tried.
        inputs: ``[K]``, mean square of each input; None without inputs.
    """
    count = scheme.outlier_count(weight.shape[1])
    if not count:
        return None
    if scheme.activations and scheme.outlier_columns and inputs is not None:
        return inputs.topk(count).indices.sort().values
    groups = scheme.groups(weight.shape[1])
    per_group = None if importance is None else importance.view(groups, -1)
    size = weight.square() if importance is None else weight.square() * importance
    others = weight.masked_fill(outlier_mask(_most(size, scheme, count), weight.shape), 0).unflatten(1, (groups, -1))
    scale, zero = search(others, scheme, dtype, steps, least, per_group)
    parts = weight.unflatten(1, (groups, -1))
    lost = (dequantize(quantize(parts, scale, zero, scheme), scale, zero) - parts).square_()
    cost = (lost if per_group is None else lost * per_group).flatten(1)
    return _most(cost, scheme, count)


def _most(cost: Tensor, scheme: QuantScheme, count: int) -> Tensor:
    judged = cost.sum(0) if scheme.outlier_columns else cost
    return judged.topk(count, dim=-1).indices.sort(-1).values


def outlier_mask(index: Tensor, shape: torch.Size) -> Tensor:
    """Mask of the outliers, bool ``[N, K]``."""
    mask = torch.zeros(shape, dtype=torch.bool, device=index.device)
    return mask.index_fill_(1, index, True) if index.ndim == 1 else mask.scatter_(1, index, True)
