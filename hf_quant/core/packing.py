"""Dense bit packing: eight codes of b bits fill exactly b bytes, low bits first.

Read as little-endian int32, 32 codes fill b words: the layout of compressed-tensors' ``weight_packed``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    Args:
        codes: ``[..., K]`` of any integer dtype, K a multiple of 8, every value in ``0..2**bits - 1``.
        bits: Width of one code, 1 to 8.

    Returns:
        uint8 ``[..., K / 8 * bits]``.
    """
    if 8 % bits == 0:
        lanes = codes.to(torch.uint8).unflatten(-1, (-1, 8 // bits))
        byte = lanes[..., 0].clone(memory_format=torch.contiguous_format)
        for i in range(1, 8 // bits):
            byte |= lanes[..., i] << (bits * i)
        return byte
    lanes = codes.unflatten(-1, (-1, 8))
    word = lanes[..., 0].to(torch.int64, copy=True)  # a copy, since it is changed in place
    for i in range(1, 8):
        word |= lanes[..., i].to(torch.int64) << (bits * i)
    return word[..., None].view(torch.uint8)[..., :bits].flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: uint8 ``[..., K]``."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(-2)
    lanes = packed.unflatten(-1, (-1, bits))
    wide = torch.int32 if bits < 4 else torch.int64  # eight codes side by side
    word = lanes[..., 0].to(wide)
    for i in range(1, bits):
        word |= lanes[..., i].to(wide) << (8 * i)
    shifts = torch.arange(8, device=packed.device, dtype=wide) * bits
    return ((word[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)


def pack_short(codes: Tensor, bits: int) -> Tensor:
    """Like `pack`, for any K: uint8 ``[..., ceil(K * bits / 8)]``; unused bits are zero."""
    count = codes.shape[-1]
    return pack(F.pad(codes, (0, -count % 8)), bits)[..., : -(-count * bits // 8)].contiguous()


def unpack_short(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_short`: uint8 ``[..., count]``."""
    return packed if bits == 8 else unpack(F.pad(packed, (0, -packed.shape[-1] % bits)), bits)[..., :count]
