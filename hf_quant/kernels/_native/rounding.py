"""Groups of a weight rounded by the compiled module: the same scales, zero points and codes as PyTorch computes, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels._native import compiled

VECTOR = 16  # shares are read in vectors of so many


def takes(groups: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> bool:
    """Whether groups ``[..., G, S]`` can be rounded here: integers with whole zero points and scales in ``dtype``, in main memory."""
    if compiled._cpu is None or scheme.codebook is not None or scheme.real_zero or scheme.blocks is not None:
        return False
    return groups.device.type == "cpu" and groups.dtype in compiled.TYPES and dtype in compiled.TYPES


def search(
    groups: Tensor, scheme: QuantScheme, dtype: torch.dtype, shares: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero point of each group, ``[..., G, 1]`` in float32, and where PyTorch has to decide instead, bool ``[..., G]``.

    Args:
        groups: float32, bf16 or float16 ``[..., G, S]``.
        scheme: Bits and symmetry.
        dtype: The dtype of stored scales, one of those of ``groups``.
        shares: float32, the ranges tried as parts of the full one.
        importance: Weight of the squared error of each column, broadcast against ``groups``; None for equal weights.
    """
    lead, size = groups.shape[:-1], groups.shape[-1]
    plain, period = groups.contiguous(), 1
    if importance is not None:
        repeated = importance.shape == groups.shape[-importance.dim() :]  # for all leading axes that it has not
        importance = (importance if repeated else importance.expand_as(groups)).float().contiguous()
        period = importance.numel() // size
    padded = torch.cat([shares, shares.new_ones(-shares.numel() % VECTOR)])
    scale, zero = (torch.empty(*lead, 1, dtype=torch.float32) for _ in range(2))
    doubtful = torch.empty(lead, dtype=torch.bool)
    compiled._cpu.search(
        plain.data_ptr(), compiled.TYPES[plain.dtype], doubtful.numel(), size,
        0 if importance is None else importance.data_ptr(), period, padded.data_ptr(), shares.numel(), scheme.bits,
        scheme.symmetric, compiled.TYPES[dtype], scale.data_ptr(), zero.data_ptr(), doubtful.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return scale, zero, doubtful


def encode(groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    """Packed codes of groups ``[..., G, S]``, uint8 ``[..., G S / 8 * bits]``; scale and zero point float32 ``[..., G, 1]``."""
    *lead, g, size = groups.shape
    packed = torch.empty(*lead, g * size // 8 * scheme.bits, dtype=torch.uint8)
    plain, scale, zero = groups.contiguous(), scale.contiguous(), zero.contiguous()
    compiled._cpu.encode(
        plain.data_ptr(), compiled.TYPES[plain.dtype], scale.numel(), size, scale.data_ptr(), zero.data_ptr(), scheme.bits,
        packed.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return packed
