"""Types of blocks: where in its bytes each code and each scale lies, as data; one function reads and one writes them all.

A row is cut into blocks of 32 or 256 weights. A block has codes, one float16 ``d``, in some types a second one, and in
K-quants an integer scale (and offset) for every 16 or 32 weights: ``w = d * scale * (code - center)`` or
``w = d * scale * code - dmin * offset``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_quant.errors import FormatError

Place = Callable[[int], tuple[int, int]]  # number of a value to the byte of its block and the lowest bit there


@dataclass(frozen=True)
class Plane:
    """Some bits of every value of a block.

    Attributes:
        width: Number of bits.
        above: Their place in the value.
        place: Where they lie.
    """

    width: int
    above: int
    place: Place


@dataclass(frozen=True)
class Block:
    """A type of blocks.

    Attributes:
        name: As llama.cpp calls it.
        number: Its number in files.
        weights: In one block.
        size: Bytes of one block.
        bits: Of a code, which is stored without a sign.
        center: The code of zero; None if an offset takes its place.
        codes: Where codes lie.
        d: Byte of the float16 that scales are multiples of.
        group: Weights that share a scale.
        scales: Where integer scales lie; none if ``d`` is the scale.
        zero_scale: Subtracted from an integer scale.
        offsets: Where integer offsets lie.
        dmin: Byte of the float16 that offsets are multiples of (without integer offsets: of the offset itself).
        signed: Whether codes, or else scales, of 8 bits are stored in two's complement.
    """

    name: str
    number: int
    weights: int
    size: int
    bits: int
    center: int | None
    codes: tuple[Plane, ...]
    d: int
    group: int
    scales: tuple[Plane, ...] = ()
    zero_scale: int = 0
    offsets: tuple[Plane, ...] = ()
    dmin: int | None = None
    signed: bool = False

    @property
    def groups(self) -> int:
        """Groups in a block."""
        return self.weights // self.group


@dataclass(frozen=True)
class Parts:
    """A weight ``[N, K]`` in B blocks a row, G groups a block.

    Attributes:
        codes: uint8 ``[N, K]``.
        d: float16 ``[N, B]``.
        scales: int16 ``[N, B, G]``; None without integer scales.
        dmin: float16 ``[N, B]``; None without offsets.
        offsets: int16 ``[N, B, G]``; None without integer offsets.
    """

    codes: Tensor
    d: Tensor
    scales: Tensor | None = None
    dmin: Tensor | None = None
    offsets: Tensor | None = None

    def scale(self) -> Tensor:
        """float32 ``[N, B * G]``: what a step of the code is worth."""
        d = self.d.float()
        return d if self.scales is None else (d[..., None] * self.scales.float()).flatten(1)

    def offset(self) -> Tensor | None:
        """float32 ``[N, B * G]``: what is subtracted; None for a center."""
        if self.dmin is None:
            return None
        dmin = self.dmin.float()
        return -dmin if self.offsets is None else (dmin[..., None] * self.offsets.float()).flatten(1)


def _halves(first: int) -> Place:
    """Low halves of 16 bytes, then high halves."""
    return lambda i: (first + i % 16, 4 * (i // 16))


def _quarters(first: int) -> Place:
    """Two bits each of 32 bytes, 128 values."""
    return lambda i: (first + 32 * (i // 128) + i % 32, 2 * (i % 128 // 32))


def _nibbles(first: int) -> Place:
    """Low halves of 32 bytes, then high halves, 64 values."""
    return lambda i: (first + 32 * (i // 64) + i % 32, 4 * (i % 64 // 32))


def _one_each(first: int) -> Place:
    """One bit of 32 bytes for every 32 values."""
    return lambda i: (first + i % 32, i // 32)


def _low_6(first: int) -> Place:
    return lambda i: (first + 64 * (i // 128) + i % 64, 4 * (i % 128 // 64))


# eight scales and eight offsets of 6 bits in 12 bytes
_SCALES_K = (
    Plane(4, 0, lambda j: (4 + j if j < 4 else 8 + j, 0)),
    Plane(2, 4, lambda j: (4 + j, 4) if j < 4 else (j, 6)),
)
_OFFSETS_K = (
    Plane(4, 0, lambda j: (8 + j, 0) if j < 4 else (8 + j, 4)),
    Plane(2, 4, lambda j: (8 + j, 4) if j < 4 else (4 + j, 6)),
)
BLOCKS = {
    block.name: block
    for block in (
        Block("Q4_0", 2, 32, 18, 4, 8, (Plane(4, 0, _halves(2)),), 0, 32),
        Block("Q4_1", 3, 32, 20, 4, None, (Plane(4, 0, _halves(4)),), 0, 32, dmin=2),
        Block("Q5_0", 6, 32, 22, 5, 16,
              (Plane(4, 0, _halves(6)), Plane(1, 4, lambda i: (2 + i // 8, i % 8))), 0, 32),
        Block("Q8_0", 8, 32, 34, 8, 128, (Plane(8, 0, lambda i: (2 + i, 0)),), 0, 32, signed=True),
        Block("Q2_K", 10, 256, 84, 2, None, (Plane(2, 0, _quarters(16)),), 80, 16,
              (Plane(4, 0, lambda j: (j, 0)),), 0, (Plane(4, 0, lambda j: (j, 4)),), 82),
        Block("Q3_K", 11, 256, 110, 3, 4, (Plane(2, 0, _quarters(32)), Plane(1, 2, _one_each(0))), 108, 16,
              (Plane(4, 0, lambda j: (96 + j % 8, 4 * (j // 8))), Plane(2, 4, lambda j: (104 + j % 4, 2 * (j // 4)))), 32),
        Block("Q4_K", 12, 256, 144, 4, None, (Plane(4, 0, _nibbles(16)),), 0, 32, _SCALES_K, 0, _OFFSETS_K, 2),
        Block("Q5_K", 13, 256, 176, 5, None, (Plane(4, 0, _nibbles(48)), Plane(1, 4, _one_each(16))), 0, 32,
              _SCALES_K, 0, _OFFSETS_K, 2),
        Block("Q6_K", 14, 256, 210, 6, 32, (Plane(4, 0, _low_6(0)), Plane(2, 4, _quarters(128))), 208, 16,
              (Plane(8, 0, lambda j: (192 + j, 0)),), 128, signed=True),
    )
}  # fmt: skip


def unpack(data: Tensor, block: Block) -> Parts:
    """The parts of a weight from its bytes, uint8 ``[N, B * size]``."""
    rows = data.unflatten(-1, (-1, block.size))
    codes = _read(rows, block.codes, block.weights)
    scales = _read(rows, block.scales, block.groups).short() if block.scales else None
    if block.signed:
        codes, scales = (codes, scales ^ 0x80) if scales is not None else (codes ^ 0x80, None)
    return Parts(
        codes.flatten(1), _half(rows, block.d), None if scales is None else scales - block.zero_scale,
        None if block.dmin is None else _half(rows, block.dmin),
        _read(rows, block.offsets, block.groups).short() if block.offsets else None,
    )  # fmt: skip


def pack(parts: Parts, block: Block) -> Tensor:
    """Inverse of `unpack`: uint8 ``[N, B * size]``."""
    codes = parts.codes.unflatten(-1, (-1, block.weights))
    rows = torch.zeros(*codes.shape[:-1], block.size, dtype=torch.uint8)
    scales = None if parts.scales is None else (parts.scales + block.zero_scale).to(torch.uint8)
    if block.signed:
        codes, scales = (codes, scales ^ 0x80) if scales is not None else (codes ^ 0x80, None)
    _write(rows, block.codes, codes)
    rows[..., block.d : block.d + 2] = parts.d[..., None].contiguous().view(torch.uint8)
    if scales is not None:
        _write(rows, block.scales, scales)
    if block.dmin is not None and parts.dmin is not None:
        rows[..., block.dmin : block.dmin + 2] = parts.dmin[..., None].contiguous().view(torch.uint8)
    if parts.offsets is not None:
        _write(rows, block.offsets, parts.offsets.to(torch.uint8))
    return rows.flatten(1)


def dequantize(data: Tensor, block: Block) -> Tensor:
    """float32 ``[N, K]``, to the last bit what the package gguf makes of these bytes."""
    parts = unpack(data, block)
    scale, offset = parts.scale()[..., None], parts.offset()
    codes = parts.codes.unflatten(-1, (-1, block.group)).float()
    dense = scale * (codes - block.center) if block.center is not None else scale * codes
    return (dense if offset is None else dense - offset[..., None]).flatten(1)


def check(data: Tensor, block: Block) -> None:
    """Refuse blocks whose scales are not finite numbers.

    Raises:
        FormatError: Says how many there are.
    """
    rows = data.unflatten(-1, (-1, block.size))
    for at in (block.d, block.dmin):
        bad = 0 if at is None else int((~_half(rows, at).isfinite()).sum())
        if bad:
            raise FormatError(f"{bad} scales of {block.name} blocks are not finite numbers")


def _half(rows: Tensor, at: int) -> Tensor:
    return rows[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


@lru_cache
def _table(planes: tuple[Plane, ...], count: int) -> list[tuple[Tensor, Tensor]]:
    """Byte and lowest bit of each value, one pair a plane."""
    tables = []
    for plane in planes:
        places = [plane.place(i) for i in range(count)]
        tables.append(
            (torch.tensor([at for at, _ in places]), torch.tensor([bit for _, bit in places], dtype=torch.uint8))
        )
    return tables


def _read(rows: Tensor, planes: tuple[Plane, ...], count: int) -> Tensor:
    values = torch.zeros(*rows.shape[:-1], count, dtype=torch.uint8)
    for plane, (at, bit) in zip(planes, _table(planes, count), strict=True):
        values |= ((rows[..., at] >> bit) & ((1 << plane.width) - 1)) << plane.above
    return values


def _write(rows: Tensor, planes: tuple[Plane, ...], values: Tensor) -> None:
    for plane, (at, bit) in zip(planes, _table(planes, values.shape[-1]), strict=True):
        part = ((values >> plane.above) & ((1 << plane.width) - 1)) << bit
        rows.index_add_(-1, at, part)  # bits of different values never meet, so that a sum is their union
