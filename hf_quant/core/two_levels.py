"""The grids of K-quants: real scales and offsets are searched for every group, and then moved onto whole multiples of one number a block.

The search is that of k-means on a line: codes for a range, then the scale and offset with the least squared error for these codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.core.k_quants import KQuant

SMALLEST, LARGEST = 2**-24, 65504.0  # of float16
NEAR = (0, -1, 1)  # whole numbers tried for a scale, from the nearest one


@dataclass(frozen=True)
class Base:
    """What the scales and offsets of a block are multiples of; float32, broadcast against ``[..., G, 1]``.

    Attributes:
        d: Of scales; may be negative where codes have a center.
        dmin: Of offsets; of no meaning without them.
    """

    d: Tensor
    dmin: Tensor


def search(
    groups: Tensor, kind: KQuant, steps: int, least: float, importance: Tensor | None, base: Base | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point with little squared error; arguments and result as of `hf_quant.core.numerics.search`.

    Args:
        groups: float32 ``[..., G, S]``, whole blocks, or any groups of one block with ``base``.
        kind: Type of the blocks.
        steps: Ranges tried.
        least: Smallest share of the range.
        importance: Weight of each column, broadcast against ``groups``.
        base: What scales are multiples of; None to choose it here.
    """
    weight = torch.ones_like(groups) if importance is None else importance.expand_as(groups)
    scale, offset = _fitted(groups, kind, steps, least, weight)
    return _whole(groups, kind, base or _base(scale, offset, kind), scale, offset, weight)


def base_of(groups: Tensor, kind: KQuant, steps: int, least: float, importance: Tensor) -> Base:
    """What the scales and offsets of one block ``[..., G, S]`` are multiples of: ``[..., 1, 1]`` each."""
    scale, offset = _fitted(groups, kind, steps, least, importance.expand_as(groups))
    base = _base(scale, offset, kind)
    return Base(base.d[..., :1, :], base.dmin[..., :1, :])


def _fitted(groups: Tensor, kind: KQuant, steps: int, least: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Real scale and offset of each group, ``[..., G, 1]``."""
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    middle, half = (groups.amax(-1, keepdim=True) + low) / 2, (groups.amax(-1, keepdim=True) - low) / 2
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    bottom, top = _reach(kind)
    scale, offset, best = torch.zeros_like(low), -low, torch.full_like(low, torch.inf)
    for share in torch.linspace(1, least, max(1, steps), dtype=torch.float32).tolist():
        if kind.offset:
            tries = [(half * 2 * share / top, half * share - middle)]
        else:
            tries = [(peak * share / bottom, torch.zeros_like(low)), (peak * share / top, torch.zeros_like(low))]
        for tried, moved in tries:
            s, o = _least_squares(groups, _codes(groups, tried, moved, kind), weight, kind)
            lost = _lost(groups, s, o, weight, kind)
            better = lost < best
            best = torch.where(better, lost, best)
            scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    return scale, offset


def _reach(kind: KQuant) -> tuple[int, int]:
    """The least and the largest code, counted from the center if there is one."""
    return (0, (1 << kind.bits) - 1) if kind.offset else (-(1 << kind.bits >> 1), (1 << kind.bits >> 1) - 1)


def _codes(groups: Tensor, scale: Tensor, offset: Tensor, kind: KQuant) -> Tensor:
    safe = torch.where(scale == 0, 1, scale)
    return ((groups + offset) / safe).round_().clamp_(*_reach(kind))


def _lost(groups: Tensor, scale: Tensor, offset: Tensor, weight: Tensor, kind: KQuant) -> Tensor:
    """Squared error of the nearest codes, ``[..., G, 1]``."""
    real = _codes(groups, scale, offset, kind).mul_(scale).sub_(offset)
    return (real.sub_(groups).square_().mul_(weight)).sum(-1, keepdim=True)


def _least_squares(groups: Tensor, codes: Tensor, weight: Tensor, kind: KQuant) -> tuple[Tensor, Tensor]:
    """The best scale and offset for these codes; an offset is not below zero."""
    weighed = weight * codes
    cross, square = ((weighed * other).sum(-1, keepdim=True) for other in (groups, codes))
    alone = torch.where(square > 0, cross / square, 0)
    if not kind.offset:
        return alone, torch.zeros_like(alone)
    total, first, real = (part.sum(-1, keepdim=True) for part in (weight, weighed, weight * groups))
    determinant = total * square - first.square()
    scale = (total * cross - first * real) / determinant
    offset = (first * cross - square * real) / determinant
    good = (determinant > 0) & (offset >= 0) & (scale > 0)
    flat = (-real / total).clamp(min=0).nan_to_num_(0)  # a group of one value: the offset alone
    return (
        torch.where(good, scale, torch.where(determinant > 0, alone.clamp(min=0), 0)),
        torch.where(good, offset, torch.where(determinant > 0, 0, flat)),
    )


def _base(scale: Tensor, offset: Tensor, kind: KQuant) -> Base:
    """For all groups ``[..., B * G, 1]`` of whole blocks; the largest scale becomes the largest whole number."""
    blocks = scale.unflatten(-2, (-1, kind.groups))
    peak = blocks.gather(-2, blocks.abs().argmax(-2, keepdim=True))
    d = peak / (kind.scales[1] if kind.offset else kind.scales[0])
    dmin = offset.unflatten(-2, (-1, kind.groups)).amax(-2, keepdim=True) / max(1, kind.offset)

    def stored(values: Tensor) -> Tensor:
        size = values.abs().clamp(min=SMALLEST, max=LARGEST).half().float()
        return torch.where(values < 0, -size, size).expand_as(blocks).flatten(-3, -2)

    return Base(stored(d), stored(dmin))


def _whole(
    groups: Tensor, kind: KQuant, base: Base, scale: Tensor, offset: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Whole multiples of the base near the real scale and offset, those with the least error: scale and zero point."""
    zero = 1 << kind.bits >> 1  # of a center
    best, chosen, moved = torch.full_like(scale, torch.inf), scale, offset
    for step in NEAR:
        s = base.d * _legal((scale / base.d).round() + step, kind)
        for o in _offsets(groups, kind, base, s, offset, weight):
            lost = _lost(groups, s, o, weight, kind)
            better = lost < best
            best = torch.where(better, lost, best)
            chosen, moved = torch.where(better, s, chosen), torch.where(better, o, moved)
    return chosen, moved / chosen if kind.offset else torch.full_like(chosen, zero)


def _legal(whole: Tensor, kind: KQuant) -> Tensor:
    """A scale is not zero: the code of zero says that as well."""
    whole = whole.clamp(*kind.scales)
    return torch.where(whole == 0, 1, whole)


def _offsets(groups: Tensor, kind: KQuant, base: Base, scale: Tensor, offset: Tensor, weight: Tensor) -> list[Tensor]:
    """The two multiples of the base around the best offset for a scale."""
    if not kind.offset:
        return [torch.zeros_like(scale)]
    real = _codes(groups, scale, offset, kind).mul_(scale).sub_(groups)
    best = (real * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
    below = (best / base.dmin).nan_to_num_(0).floor()
    return [base.dmin * (below + up).clamp(0, kind.offset) for up in (0, 1)]


def moved_within(
    codes: Tensor, scale: Tensor, zero: Tensor, slope: Tensor, H: Tensor, kind: KQuant, base: Base
) -> tuple[Tensor, Tensor, Tensor]:
    """Other multiples of the base for one group with fixed codes, where they lower ``tr((Q - W) H (Q - W)^T)``.

    Args:
        codes: float32 ``[S, N]``.
        scale: ``[N]``.
        zero: ``[N]``.
        slope: ``[S, N]``, ``H (Q - W)`` at these columns.
        H: ``[S, S]``, between these columns.
        kind: Type of the block.
        base: ``[N]`` each.

    Returns:
        Scale, zero point, and the change of the weights ``[S, N]``.
    """
    steps = codes if kind.offset else codes - zero
    curve = ((H @ steps) * steps).sum(0)
    best = scale - (steps * slope).sum(0) / curve
    best = base.d * _legal((best / base.d).nan_to_num_(0).round(), kind)
    step = best - scale
    lower = (curve * step + 2 * (steps * slope).sum(0)) * step < 0
    new, moved = torch.where(lower, best, scale), steps * torch.where(lower, step, 0)
    if not kind.offset:
        return new, zero, moved
    before = base.dmin * (zero * scale / base.dmin).round()  # to the last bit what it was
    total, steep = H.sum(), (slope + H @ moved).sum(0)
    after = base.dmin * ((before + steep / total) / base.dmin).nan_to_num_(0).round().clamp(0, kind.offset)
    sink = after - before
    lower = (total * sink - 2 * steep) * sink < 0
    return new, torch.where(lower, after, before) / new, moved - torch.where(lower, sink, 0)


def holds(scale: Tensor, zero: Tensor | None, kind: KQuant) -> bool:
    """Whether scales ``[N, G]`` and offsets are whole multiples of a float16, so that a file can hold them."""
    blocks = scale.float().unflatten(-1, (-1, kind.groups))
    if multiples(blocks, *kind.scales) is None:
        return False
    if zero is None:
        return True
    zeros = zero.float().view_as(blocks)
    return multiples(zeros.double() * blocks.double(), 0, kind.offset, blocks, zeros) is not None


def multiples(
    values: Tensor, least: int, most: int, scale: Tensor | None = None, zero: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """``values [N, B, G]`` as integers times a float16 ``[N, B]``, exactly; None if there is none.

    Values that are only nearly multiples, since they are zero points times ``scale``, must give ``zero`` again.
    """
    peak = values.gather(-1, values.abs().argmax(-1, keepdim=True))  # with its sign
    d = torch.zeros_like(peak).half()
    integers = torch.zeros_like(values, dtype=torch.int16)
    open_ = peak != 0
    for k in (k for size in range(max(most, -least), 0, -1) for k in (size, -size) if least <= k <= most):
        if not bool(open_.any()):
            break
        candidate = (peak / k).half()
        whole = (values / candidate).round().nan_to_num(0, 0, 0).clamp(least, most)
        products = candidate.float() * whole.float()
        same = products == values if scale is None or zero is None else products / scale == zero
        fits = open_ & same.all(-1, keepdim=True) & (candidate != 0)
        d = torch.where(fits, candidate, d)
        integers = torch.where(fits, whole.short(), integers)
        open_ &= ~fits
    return None if bool(open_.any()) else (d.squeeze(-1), integers)
