"""The affine map between real numbers and codes: ``w = (q - zero_point) * scale``."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.core import two_levels
from hf_quant.core.scheme import QuantScheme

LEVELS = {
    # quantiles of the normal distribution: QLoRA, https://arxiv.org/abs/2305.14314, appendix E
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
            1.0),
    # sign, two bits of exponent, one of mantissa, divided by the largest, in bitsandbytes' order of codes
    "fp4": tuple(sign * level / 12 + 0.0 for sign in (1, -1) for level in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
    # the same format with its own values, in the order of its bits: OCP microscaling formats, version 1.0, section 5.3.3
    **dict.fromkeys(
        ("e2m1", "nvfp4"),
        tuple(sign * level + 0.0 for sign in (1, -1) for level in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
    ),
}  # fmt: skip


TOGETHER = 1 << 18  # weights times ranges that are searched together: small weights in a few operations


def padded(columns: Tensor, scheme: QuantScheme) -> Tensor:
    """``columns`` ``[..., K]`` with the zeros behind them that ``scheme`` stores."""
    return F.pad(columns, (0, scheme.padding)) if scheme.padding else columns


def grouped(columns: Tensor, scheme: QuantScheme) -> Tensor:
    """The same in groups, ``[..., G, S]``."""
    return padded(columns, scheme).unflatten(-1, (scheme.groups(columns.shape[-1]), -1))


def minmax(groups: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover the range of each group.

    Args:
        groups: float32 ``[..., G, K/G]``.
        scheme: Bits and symmetry.

    Returns:
        ``(scale, zero_point)``, float32 ``[..., G, 1]``; the zero point is a whole number in ``0..qmax``.
    """
    lo = groups.amin(-1, keepdim=True).clamp(max=0)
    hi = groups.amax(-1, keepdim=True).clamp(min=0)
    if scheme.symmetric:
        scale = torch.maximum(hi, -lo) * 2 / scheme.qmax
        return scale, torch.full_like(scale, scheme.zero)
    scale = (hi - lo) / scheme.qmax
    return scale, torch.round(-lo / floored(scale, torch.float32)).clamp(0, scheme.qmax)


def quantize_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 of activations, rounded as in vLLM: ``x = q * scale``.

    Args:
        x: ``[..., K]``.
        scale: Broadcast against ``x``; None for the largest magnitude of each row over 127.

    Returns:
        ``q`` in float32, whole numbers in -127..127, and the float32 scale ``[..., 1]``. Rows of zeros have codes of zero; a row with
            NaN or infinite values has a scale that is not finite either, so that they remain visible.
    """
    wide = x.float()
    if scale is None:
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 127) / 127
    return (wide / scale).round_().clamp_(-127, 127), scale


@lru_cache
def levels(codebook: str, device: torch.device) -> Tensor:
    """The 16 levels of a codebook by code, float32."""
    with torch.inference_mode(False):  # the result is cached, and autograd refuses tensors made in inference mode
        return torch.tensor(LEVELS[codebook], dtype=torch.float32, device=device)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same in shape, dtype and every bit, the signs of zeros too; so NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1)
    if flat.stride(0) != 1:  # a single number may have any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def floored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to ``dtype``, as float32, and never zero, so that a group of zeros stays finite.

    In float16 the smallest scale is the smallest subnormal number, 2^-24: normal numbers end at 2^-14, and scales of 8-bit codes of
    ordinary weights are smaller. For other dtypes it is a normal number, since float32 arithmetic may flush subnormal ones to zero.
    """
    tiny = 2**-24 if dtype is torch.float16 else torch.finfo(dtype).tiny
    most = min(torch.finfo(kind).max for kind in (dtype, scale.dtype))
    return scale.clamp(min=tiny, max=most).to(dtype).float()


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes of ``weight``, in its dtype; ``scale`` and ``zero_point`` broadcast against it."""
    real = weight / scale
    real = real.add_(zero_point).round_() if scheme.real_zero else real.round_().add_(zero_point)
    return real.clamp_(scheme.qmin, scheme.qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real numbers for ``codes``; the inverse of `quantize` up to rounding."""
    return (codes - zero_point) * scale


def search(
    groups: Tensor, scheme: QuantScheme, dtype: torch.dtype, steps: int, least: float, importance: Tensor | None = None,
    base: two_levels.Base | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale and zero point with the least squared error among shrunk ranges, starting with the full one.

    Args:
        groups: float32 ``[..., G, K/G]``.
        scheme: Bits and symmetry.
        dtype: The dtype of stored scales.
        steps: Ranges tried, from the full one down to ``least`` of it; 0 for the full one.
        least: Smallest share of the range.
        importance: Weight of the squared error of each column, broadcast against ``groups``; None for equal weights.
        base: Of a K-quant, if it has been chosen already: what scales and offsets are multiples of.

    Returns:
        ``(scale, zero_point)``, float32 ``[..., G, 1]``; the scale is representable in ``dtype``.
    """
    if scheme.k_quant is not None:
        return two_levels.search(groups, scheme.k_quant, steps, least, importance, base)
    scale, zero = minmax(groups, scheme)
    widest = scale = floored(scale, dtype)
    if not steps:
        return scale, zero
    best = torch.full_like(scale, torch.inf)
    low = -zero * scale  # the real value of code 0 in the full range
    every_share = torch.linspace(1, least, steps, dtype=torch.float32).to(groups.device)
    for shares in every_share.split(max(1, TOGETHER // max(1, groups.numel()))):
        share = shares.view(-1, *[1] * groups.dim())
        tried = floored(widest * share, dtype)
        moved = zero[None] if scheme.symmetric else torch.round(-low * share / tried).clamp(0, scheme.qmax)
        # (codes - zero_point) * scale - w, without two passes to subtract and add the zero point
        square_error = (
            torch.div(groups, tried).round_().clamp_(-moved, scheme.qmax - moved).mul_(tried).sub_(groups).square_()
        )
        errors = (square_error if importance is None else square_error.mul_(importance)).sum(-1, keepdim=True)
        error, index = errors.nan_to_num_(torch.inf, torch.inf).min(0, keepdim=True)  # the first of equal ones
        better = error[0] < best
        best = torch.where(better, error[0], best)
        scale = torch.where(better, tried.gather(0, index)[0], scale)
        zero = zero if scheme.symmetric else torch.where(better, moved.gather(0, index)[0], zero)
    return scale, zero


def relative_error(given: Tensor, expected: Tensor) -> Tensor:
    """Squared error of every row of ``given [..., d]`` over the squared size of that of ``expected [..., d]``: ``[...]``."""
    size = expected.square().sum(-1).clamp(min=torch.finfo(expected.dtype).tiny)
    return (given - expected).square().sum(-1) / size
