"""The constants that the Triton product is compiled for: all that follows from a scheme, a width and a dtype."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from hf_quant.core.numerics import levels
from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels._triton.planar import fields, grouped, held_in, plane, positions, unpacking

NARROW = (torch.float16, torch.bfloat16)


@lru_cache
def constants(scheme: QuantScheme, k: int, dtype: torch.dtype, cuda: bool, after: bool) -> dict[str, Any]:
    """What the kernel is compiled for, apart from its tile.

    Args:
        scheme: Of the weight.
        k: Columns.
        dtype: Of x.
        cuda: Whether the kernel may hold PTX.
        after: Whether sums are scaled, and not weights.
    """
    bits, group = held_in(scheme.bits), grouped(scheme, k)
    count, size = fields(bits), plane(group, bits)
    run = count  # planes that share a scale in every block
    if group % (count * size):
        run = group // size if count * size % group == 0 else 1
    constexprs: dict[str, Any] = {"ASM": None, "OPERANDS": None, "AT": -1}
    if cuda and dtype in NARROW:
        book = tuple(levels(scheme.codebook, torch.device("cpu")).tolist()) if scheme.codebook else None
        constexprs["ASM"], constexprs["OPERANDS"] = unpacking(bits, dtype, book)
        if book is None and not (bits == 8 and dtype is torch.bfloat16):
            constexprs["AT"] = sum(position << (4 * j) for j, (_, position) in enumerate(positions(bits, dtype)))
    constexprs["FOLD"] = after and not cuda and dtype is torch.bfloat16 and bits < 8 and scheme.codebook is None
    exact = bits < 8 and not scheme.real_zero  # base + zero point is then exact in 16 bits
    return constexprs | {
        "BITS": bits, "GROUP": group, "P": size, "RUN": run, "FIXED": 0 if scheme.codebook else scheme.zero,
        "ZERO": 0 if scheme.symmetric else 1 if exact else 2, "EVEN": k % (count * size) == 0,
    }  # fmt: skip
