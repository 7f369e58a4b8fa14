"""Transposes of packed codes, as checkpoints need them that store columns where we store rows, by compiled code where there is any."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hf_quant import _upwards
from hf_quant.core.pages import empty

CACHED = 1 << 15  # words of one row of squares that are worked on at a time


def transposed(words: Tensor) -> Tensor:
    """The transpose ``[C, R]`` of int32 ``words [R, C]``, contiguous."""
    out = empty((words.shape[1], words.shape[0]), words.dtype, words.device)
    compiled = _upwards.words()
    if compiled.takes(words, out):
        compiled.transpose(words, out)
    else:
        out.copy_(words.T)
    return out


def transposed_codes(words: Tensor, order: Sequence[int]) -> Tensor:
    """The transpose of the codes of four bits in int32 ``words [R, C]``: int32 ``[8 C, ceil(R / 8)]``, with zeros behind the last.

    Args:
        words: Eight codes each, the first one in the lowest bits.
        order: Which of eight rows of the result each of them belongs to.
    """
    rows, columns = words.shape
    words = F.pad(words, (0, 0, 0, -rows % 8)) if rows % 8 else words
    out = empty((8 * columns, len(words) // 8), words.dtype, words.device)
    compiled = _upwards.words()
    if compiled.takes(words, out):
        compiled.transpose_codes(words, out, order)
    else:
        _transpose_codes(words, out.view(columns, 8, -1), order)
    return out


def _transpose_codes(words: Tensor, out: Tensor, order: Sequence[int]) -> None:
    """The same by PyTorch, into ``out [C, 8, R / 8]``.

    Eight words below each other are a square of eight by eight codes. It is transposed by swapping its halves, then quarters, then
    single codes, each time those above the diagonal with those below it.
    """
    columns = words.shape[1]
    squares = words.view(-1, 8, columns)
    size = max(1, CACHED // (columns or 1))
    for first in range(0, len(squares), size):
        part = squares[first : first + size].clone()
        for distance, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
            for i in (i for i in range(8) if not i & distance):
                low, high = part[:, i], part[:, i + distance]
                other = (low >> 4 * distance).bitwise_xor_(high).bitwise_and_(mask)
                high ^= other
                low ^= other.bitwise_left_shift_(4 * distance)
        for i, row in enumerate(order):
            out[:, row, first : first + size] = part[:, i].T
