"""Transposes of words of 32 bits, and of the codes in them, by the compiled module, which takes them square by square."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_quant.kernels._native import compiled


def takes(words: Tensor, out: Tensor) -> bool:
    """Whether they are words in main memory, in rows without gaps between their columns."""
    return compiled._cpu is not None and all(
        t.device.type == "cpu" and t.dtype == torch.int32 and t.numel() > 0 and t.stride(-1) == 1 for t in (words, out)
    )


def transpose(words: Tensor, out: Tensor) -> None:
    """``out [C, R]`` becomes the transpose of ``words [R, C]``."""
    _turn(words, out, words.shape[0], 0)


def transpose_codes(words: Tensor, out: Tensor, order: Sequence[int]) -> None:
    """``out [8 C, R / 8]`` becomes the transpose of the codes of four bits in ``words [R, C]``, R a multiple of 8.

    Code i of a word goes to the row ``order[i]`` of the eight rows of its column.
    """
    _turn(words, out, words.shape[0] // 8, sum(row << 4 * i for i, row in enumerate(order)))


def _turn(words: Tensor, out: Tensor, wide: int, order: int) -> None:
    rows, columns = words.shape
    strides = max(words.stride(0), columns), max(out.stride(0), wide)
    threads = torch.get_num_threads()
    compiled._cpu.turn(words.data_ptr(), rows, columns, strides[0], out.data_ptr(), strides[1], order, threads)
