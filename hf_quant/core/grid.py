"""Weights that already lie on a grid: models from quantization-aware training are published in 16 bits, and their codes are in there.

Such a group is a scale times whole numbers, up to the rounding of 16 bits. The scale is then recovered and not searched, so that
the codes are the ones the model was trained with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_quant.core.numerics import floored
from hf_quant.core.scheme import QuantScheme

SAMPLE = 64  # groups that are looked at first
MOST = 0.9  # share of them that must lie on a grid
TOLERANCE = 2**-7  # of each whole number: the rounding of a weight and of a scale to eight bits
TELLING = 16  # whole numbers up to this tell a grid: a much larger one is within its tolerance of everything
FEW = 4  # so many of them must be in a group
FIRST, COLUMNS = 8, 32  # groups, and columns of each, that tell ordinary weights: every weight is looked at like this


def recovered(groups: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
    """Scale and zero point of the groups that lie on a grid of the scheme.

    Args:
        groups: floating point ``[..., G, K/G]``.
        scheme: Of the codes.
        dtype: The dtype of stored scales.

    Returns:
        Scale, zero point and whether the group lies on that grid, ``[..., G, 1]`` each; None if most groups lie on none.
    """
    flat = groups.reshape(-1, groups.shape[-1])
    sample = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE]
    sample = sample[sample.count_nonzero(-1) > 2].float()  # a group of one or two values lies on many grids
    if not len(sample) or _misses(sample[:FIRST], scheme) > (1 - MOST) * len(sample):
        return None
    if float(_on_grid(sample, scheme)[0].float().mean()) < MOST:
        return None
    fitting, scale, zero = _on_grid(flat.float(), scheme)
    shape = (*groups.shape[:-1], 1)
    return floored(scale, dtype).view(shape), zero.view(shape), fitting.view(shape)


def _misses(groups: Tensor, scheme: QuantScheme) -> int:
    """How many of the groups ``[M, S]`` have a weight, among the first few, that fits no grid; `_on_grid` finds none for them."""
    steps = groups.abs().amax(-1) / torch.arange(1, _levels(scheme) + 1, device=groups.device)[:, None]
    real = groups[:, :COLUMNS] / steps[..., None]
    return int((~_is_near(real, real.round()).any(0)).sum())


def _levels(scheme: QuantScheme) -> int:
    """The largest whole number that the largest weight of a group may be."""
    return scheme.zero if scheme.symmetric else scheme.qmax


def _is_near(real: Tensor, whole: Tensor) -> Tensor:
    """Whether all values of a group are whole numbers, up to rounding: bool ``[..., M]`` of ``[..., M, S]``."""
    return ((real - whole).abs() <= TOLERANCE * whole.abs()).all(-1)


def _on_grid(groups: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each group ``[M, S]`` lies on a grid, its scale and its zero point, ``[M]`` each: the coarsest grid that fits."""
    peak = groups.abs().amax(-1)
    fitting = torch.zeros_like(peak, dtype=torch.bool)
    scale, zero = torch.ones_like(peak), torch.full_like(peak, scheme.zero)
    for k in range(1, _levels(scheme) + 1):
        real = groups / (peak / k)[:, None]
        whole = real.round()
        least, most = whole.amin(-1).clamp(max=0), whole.amax(-1).clamp(min=0)
        moved = torch.full_like(least, scheme.zero) if scheme.symmetric else -least
        fits = (
            _is_near(real, whole)
            & ((whole.abs() <= TELLING).sum(-1) >= FEW)
            & (least >= -moved)
            & (most + moved <= scheme.qmax)
        )
        fits &= ~fitting & (peak > 0)
        best = (groups * whole).sum(-1) / whole.square().sum(-1)  # least squares: every weight was rounded by itself
        scale, zero = torch.where(fits, best, scale), torch.where(fits, moved, zero)
        fitting |= fits
        if bool(fitting.all()):
            break
    return fitting, scale, zero
