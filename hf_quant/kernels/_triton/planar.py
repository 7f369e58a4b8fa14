"""The layout of codes for tensor cores: planes side by side in 16-bit words, read without shuffling.

A word holds F = 16 // bits codes (five of three bits), and a block of ``F * P`` consecutive columns fills P words: word i of
a block holds columns i, P + i, 2 P + i, ... in its fields, low bits first. Two neighbouring words in a 32-bit register are
then two neighbouring columns of every plane, as the matrix instructions want them, and one instruction turns a plane into
floating point: ``(word & mask) | magic`` is ``base + code * 2**position`` in two halves, where ``base`` is 128 in bfloat16
and 1024 in float16, whose mantissas have 7 and 10 bits. The trick is that of FasterTransformer (Kim et al., "Who Says
Elephants Can't Run", arXiv:2211.10017); planes of columns make it need no permutation.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hf_quant.core.packing import pack, unpack
from hf_quant.core.scheme import BITS, QuantScheme

CHUNK = 1 << 22  # codes laid out together


def held_in(bits: int) -> int:
    """Bits of a code in a word: those of five to seven, which fill words badly, take eight there."""
    return bits if bits in BITS else 8


def fields(bits: int) -> int:
    """F, the codes in a word."""
    return 16 // bits


def plane(group: int, bits: int) -> int:
    """P, the columns of a plane: no more than a group, so that a plane has one scale; ``group`` 0 for one of all columns.

    The eight planes of two bits are half as wide, or x would not fit into shared memory.
    """
    most = 32 if bits == 2 else 64
    return min(most, group) if group else most


def words(k: int, bits: int, size: int) -> int:
    """Words in a row of ``k`` columns in planes of ``size``; the last block is filled up."""
    return -(-k // (fields(bits) * size)) * size


parsed = lru_cache(QuantScheme.parse)  # the operations get slugs, at every call


def grouped(scheme: QuantScheme, k: int) -> int:
    """The group size of ``scheme`` for ``k`` columns; 0 for one group of all columns."""
    return 0 if scheme.group_size in (-1, k) else scheme.group_size


@lru_cache
def layout(scheme: QuantScheme, k: int) -> tuple[int, int]:
    """Groups, and words in a row, of a weight of ``k`` columns.

    Raises:
        SchemeError: The group size does not divide ``k``.
    """
    bits = held_in(scheme.bits)
    return scheme.groups(k), words(k, bits, plane(grouped(scheme, k), bits))


def to_planes(qweight: Tensor, bits: int, size: int) -> Tensor:
    """Portable codes ``[..., N, K / 8 * bits]`` to int16 words ``[..., N, words]``; spare codes are 0."""
    k = qweight.shape[-1] * 8 // bits
    rows = qweight.reshape(-1, qweight.shape[-1])
    packed = torch.empty(rows.shape[0], words(k, bits, size), dtype=torch.int16, device=qweight.device)
    step = max(1, CHUNK // k)
    for i in range(0, rows.shape[0], step):
        codes = unpack(rows[i : i + step], bits).int()
        codes = torch.nn.functional.pad(codes, (0, packed.shape[1] * fields(bits) - k))
        planes = codes.unflatten(1, (-1, fields(bits), size))
        word = planes[:, :, 0].clone()
        for j in range(1, fields(bits)):
            word |= planes[:, :, j] << (bits * j)
        packed[i : i + step] = word.to(torch.int16).flatten(1)
    return packed.view(*qweight.shape[:-1], -1)


def from_planes(packed: Tensor, bits: int, size: int, k: int) -> Tensor:
    """Inverse of `to_planes`."""
    rows = packed.reshape(-1, packed.shape[-1])
    qweight = torch.empty(rows.shape[0], k * bits // 8, dtype=torch.uint8, device=packed.device)
    step = max(1, CHUNK // k)
    for i in range(0, rows.shape[0], step):
        word = rows[i : i + step].int().unflatten(1, (-1, size))
        codes = torch.stack([(word >> (bits * j)) & ((1 << bits) - 1) for j in range(fields(bits))], 2)
        qweight[i : i + step] = pack(codes.flatten(1)[:, :k], bits)
    return qweight.view(*packed.shape[:-1], -1)


@lru_cache
def positions(bits: int, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """``(shift, position)`` of each plane: the word is shifted right, then the code sits at that bit of the mantissa."""
    mantissa, shift, places = 7 if dtype is torch.bfloat16 else 10, 0, []
    for j in range(fields(bits)):
        if bits * (j + 1) - shift > mantissa:
            shift = bits * j
        places.append((shift, bits * j - shift))
    return tuple(places)


@lru_cache
def unpacking(bits: int, dtype: torch.dtype, codebook: tuple[float, ...] | None = None) -> tuple[str, str]:
    """PTX that unpacks two words into F registers of two halves each, and its operands.

    Integers of up to four bits, and of eight in float16, come as ``base + code * 2**position``; those of eight in bfloat16
    as ``code - 128``, put together from two halves of four bits; codes of a codebook as its levels.
    """
    count = fields(bits)
    if codebook is not None:
        lines = _looked_up(codebook, dtype)
    elif bits == 8 and dtype is torch.bfloat16:
        lines = _bytes()
    else:
        magic, lines, source, at = (0x4300 if dtype is torch.bfloat16 else 0x6400) * 0x10001, [], f"${count}", 0
        for j, (shift, position) in enumerate(positions(bits, dtype)):
            if shift != at:
                source, at = "w", shift
                lines.append(f"shr.u32 w, ${count}, {shift};")
            mask = ((1 << bits) - 1 << position) * 0x10001
            lines.append(f"lop3.b32 ${j}, {source}, {mask:#010x}, {magic:#010x}, 0xEA;")
    body = "\n".join(["{ .reg .b32 w;", *lines, "}"])
    return body, ",".join(["=&r"] * count + ["r"])


def _bytes() -> list[str]:
    """``code - 128`` of two bytes: 16 (high - 8) + low, each half exact in bfloat16."""
    lines = [".reg .b32 low, high, one, minus, many, rest;",
             "mov.b32 one, 0x3F803F80; mov.b32 minus, 0xC300C300; mov.b32 many, 0x41804180; mov.b32 rest, 0xC508C508;"]  # fmt: skip
    for j in range(2):
        source = "w" if j else "$2"
        lines += ["shr.u32 w, $2, 8;"] * j
        lines += [
            f"lop3.b32 low, {source}, 0x000F000F, 0x43004300, 0xEA; shr.u32 high, {source}, 4;",
            "lop3.b32 high, high, 0x000F000F, 0x43004300, 0xEA;",
            "fma.rn.bf16x2 low, low, one, minus;",  # low = 128 + code - 128
            "fma.rn.bf16x2 high, high, many, rest;",  # 16 (128 + code) - 16 * 136
            f"fma.rn.bf16x2 ${j}, low, one, high;",
        ]
    return lines


def _looked_up(codebook: tuple[float, ...], dtype: torch.dtype) -> list[str]:
    """Levels by byte permutation: ``prmt`` picks four bytes out of eight by four selectors of three bits at once."""
    halves = torch.tensor(codebook, dtype=dtype).view(torch.int16).tolist()
    table = {}
    for part, shift in (("l", 0), ("h", 8)):  # low and high bytes of the levels, four to a register
        for i in range(4):
            picked = [(halves[4 * i + j] >> shift) & 255 for j in range(4)]
            table[f"{part}{i}"] = sum(byte << (8 * j) for j, byte in enumerate(picked))
    lines = [f".reg .b32 {', '.join(table)}, s, t, a, b, {', '.join(f'{p}{w}' for p in 'uv' for w in range(2))};"]
    lines += [f"mov.b32 {name}, {value:#010x};" for name, value in table.items()]
    for word in range(2):
        lines += [f"shr.u32 w, $4, {16 * word};"] * word
        source = "w" if word else "$4"
        lines += [f"and.b32 s, {source}, 0x7777; shr.u32 t, {source}, 1; lop3.b32 t, t, 0x4444, 0x3210, 0xEA;"]
        for part, out in (("l", "u"), ("h", "v")):
            lines += [
                f"prmt.b32 a, {part}0, {part}1, s; prmt.b32 b, {part}2, {part}3, s;",
                f"prmt.b32 {out}{word}, a, b, t;",  # byte j: of the level that field j of the word means
            ]
    # bytes of fields 0, 1 of both words, then of fields 2, 3, side by side
    for pair, selector in ((0, 0x5140), (2, 0x7362)):
        lines += [f"prmt.b32 a, u0, v0, {selector:#06x}; prmt.b32 b, u1, v1, {selector:#06x};"]
        lines += [f"prmt.b32 ${pair}, a, b, 0x5410; prmt.b32 ${pair + 1}, a, b, 0x7632;"]
    return lines
