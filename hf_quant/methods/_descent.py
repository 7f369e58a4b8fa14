"""Coordinate descent over the codes and scales of any method: CDQuant (arXiv:2406.17542), extended to scales."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_quant.core.numerics import floored
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.two_levels import Base, moved_within


def descend(
    W: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, H: Tensor, scheme: QuantScheme, dtype: torch.dtype,
    sweeps: int, free: tuple[Tensor, Tensor] | None = None, base: Base | None = None,
) -> None:  # fmt: skip
    """Lower ``tr((Q - W) H (Q - W)^T)``, in place. Only the rounding of scales to ``dtype`` can raise it.

    All matrices are transposed, so that a column of weights is contiguous.

    Args:
        W: float32 ``[K, N]``, the weights to approximate.
        codes: float32 ``[K, N]``, changed in place.
        scale: float32 ``[G, N]``, changed in place.
        zero: float32 ``[G, N]``, of K-quants changed in place.
        H: float32 ``[K, K]``, up to a factor.
        scheme: Scheme of the codes.
        dtype: The dtype of stored scales.
        sweeps: Number of passes over all scales and columns.
        free: Mask of the outliers, bool ``[K, N]``, and their values, float32 ``[K, N]``, changed in place; None without outliers.
        base: Of K-quants: what scales and offsets are multiples of, ``[G, N]`` each.
    """
    G, size = scale.shape[0], W.shape[0] // scale.shape[0]
    Q = ((codes.view(G, size, -1) - zero[:, None]) * scale[:, None]).view_as(W)
    if free is not None:
        Q = torch.where(free[0], free[1], Q)
    slope = H @ Q.sub_(W)  # half the gradient, updated with every change
    del Q
    for _ in range(sweeps):
        for g in H.diagonal().view(G, size).sum(1).argsort(descending=True, stable=True).tolist():
            now = slice(g * size, (g + 1) * size)
            if scheme.k_quant is not None and base is not None:
                one = Base(base.d[g], base.dmin[g])
                scale[g], zero[g], moved = moved_within(
                    codes[now], scale[g], zero[g], slope[now], H[now, now], scheme.k_quant, one
                )
            else:
                moved = _rescale(now, g, codes, scale, zero, slope, H, dtype, free)
            local = slope[now] + H[now, now] @ moved
            moved += _recode(now, g, codes, scale, zero, local, H, scheme, free)
            slope.addmm_(H[:, now], moved)


def _rescale(
    now: slice, g: int, codes: Tensor, scale: Tensor, zero: Tensor, slope: Tensor, H: Tensor, dtype: torch.dtype,
    free: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """The best scale of one group for fixed codes; returns the change of its weights."""
    steps = codes[now] - zero[g]
    if free is not None:
        steps = steps.masked_fill(free[0][now], 0)
    curve = ((H[now, now] @ steps) * steps).sum(0)
    best = scale[g] - (steps * slope[now]).sum(0) / curve
    best = torch.where((curve > 0) & (best > 0), floored(best, dtype), scale[g])
    moved = steps * (best - scale[g])
    scale[g] = best
    return moved


def _recode(
    now: slice, g: int, codes: Tensor, scale: Tensor, zero: Tensor, local: Tensor, H: Tensor, scheme: QuantScheme,
    free: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """The best codes of one column after the other, all else fixed; returns the change of the group's weights.

    ``local`` is the slope of the group, which is used up.
    """
    block = H[now, now]
    moved = torch.zeros_like(local)
    for j in range(block.shape[0]):
        at = now.start + j
        if block[j, j] <= 0:
            continue
        step = local[j] / -block[j, j]
        code = (codes[at] + step / scale[g]).round_().clamp_(scheme.qmin, scheme.qmax)
        change = (code - codes[at]) * scale[g]
        if free is not None:
            outlier = free[0][at]
            change = torch.where(outlier, step, change)
            code = torch.where(outlier, codes[at], code)
            free[1][at] += step * outlier
        codes[at] = code
        moved[j] = change
        local[j + 1 :].addr_(block[j, j + 1 :], change)
    return moved
