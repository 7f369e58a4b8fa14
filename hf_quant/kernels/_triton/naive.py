"""What `triton_wna16` computes, in plain loops in float64: slow, short, and what its tests compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels._triton.planar import held_in


def codes(packed: Tensor, bits: int, size: int, k: int) -> Tensor:
    """The codes int64 ``[N, K]`` of words int16 ``[N, words]`` in planes of ``size`` columns (`planar`)."""
    in_word = 16 // bits
    unpacked = torch.zeros(packed.shape[0], k, dtype=torch.int64)
    for column in range(k):
        block, rest = divmod(column, in_word * size)
        field, word = divmod(rest, size)
        unpacked[:, column] = (packed[:, block * size + word].cpu().long() >> bits * field) & ((1 << bits) - 1)
    return unpacked


def weights(
    packed: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, scheme: QuantScheme, size: int, k: int
) -> Tensor:
    """The weight ``[N, K]`` in float64; scale and zero ``[G, N]``, table ``[16]``."""
    unpacked, group = codes(packed, held_in(scheme.bits), size, k), k // scale.shape[0]
    dense = torch.zeros(unpacked.shape, dtype=torch.float64)
    for column in range(k):
        g = column // group
        if table is not None:
            real = table.cpu().double()[unpacked[:, column]]
        else:
            real = unpacked[:, column].double() - (scheme.zero if zero is None else zero[g].cpu().double())
        dense[:, column] = real * scale[g].cpu().double()
    return dense


def product(
    x: Tensor, dense: Tensor, bias: Tensor | None, index: Tensor | None, value: Tensor | None, *,
    split_k: int = 1, block: int = 1,
) -> Tensor:  # fmt: skip
    """``x [M, K] @ dense.T`` with bias and outliers, ``[M, N]`` in float64.

    Args:
        x: ``[M, K]``.
        dense: Of `weights`.
        bias: ``[N]``.
        index: ``[C]``, columns of all rows, or ``[N, R]``, columns of each row.
        value: ``[N, C]`` or ``[N, R]``, added to the weight there.
        split_k: The number of programs that share the columns; each adds up its own, then the parts are added in order.
        block: Columns come in blocks of that many, and each program takes as many blocks as the others.
    """
    (m, k), n = x.shape, dense.shape[0]
    wide, parts = x.cpu().double(), torch.zeros(split_k, m, n, dtype=torch.float64)
    share = math.ceil(math.ceil(k / block) / split_k) * block  # columns of a program
    for part in range(split_k):
        for column in range(part * share, min(k, (part + 1) * share)):
            parts[part] += wide[:, column, None] * dense[:, column]
    y = torch.zeros(m, n, dtype=torch.float64)
    for part in range(split_k):
        y += parts[part]
    if index is not None and value is not None:
        for row in range(n):
            columns = index if index.ndim == 1 else index[row]
            for column, extra in zip(columns.tolist(), value[row].tolist(), strict=True):
                y[:, row] += wide[:, column] * extra
    return y if bias is None else y + bias.cpu().double()
