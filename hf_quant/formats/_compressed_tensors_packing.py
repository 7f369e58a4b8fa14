"""Packed integers of compressed-tensors: in the layout that it has since 0.13, and in the one before, in which no code crosses a word.

In 2, 4 and 8 bits both layouts are one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.core.packing import pack, unpack
from hf_quant.core.scheme import MULTIPLE, QuantScheme
from hf_quant.errors import FormatError
from hf_quant.formats._common import codes_of, need

SHAPES = (torch.int64, torch.int32)


def stored_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """N and K, as the checkpoint stores them."""
    n, k = (int(size) for size in need(tensors, "weight_shape", SHAPES, (2,)))
    if not (1 <= n < 1 << 32 and 1 <= k < 1 << 32) or k % MULTIPLE:
        raise FormatError(f"weight_shape {[n, k]}: in_features must be a multiple of {MULTIPLE}")
    return n, k


@dataclass(frozen=True)
class Layout:
    """How codes lie in int32 words.

    Attributes:
        bits: Of a code in the file.
        old: Whether it is the layout before 0.13.
    """

    bits: int
    old: bool = False

    def words(self, count: int) -> int:
        """That ``count`` codes fill."""
        return -(-count // (32 // self.bits)) if self.old else -(-count * self.bits // 32)

    def packed(self, words: Tensor, k: int) -> Tensor:
        """Portable codes uint8 ``[N, K / 8 * bits]`` from ``[N, W]``."""
        if not self.old:
            return words.contiguous().view(torch.uint8)
        return pack(self.codes(words, k), self.bits)

    def codes(self, words: Tensor, count: int) -> Tensor:
        """uint8 ``[R, count]`` from ``[R, W]``."""
        if self.old:
            shifts = torch.arange(0, 32 - self.bits + 1, self.bits, device=words.device)
            codes = ((words[..., None] >> shifts) & ((1 << self.bits) - 1)).to(torch.uint8).flatten(-2)
        else:
            padded = F.pad(words.contiguous(), (0, -(-count // 32) * self.bits - words.shape[1]))
            codes = unpack(padded.view(torch.uint8), self.bits)
        return codes[:, :count]


def layout_of(shape: Sequence[int], n: int, k: int, bits: int) -> Layout:
    """The layout of a packed weight ``[N, K]`` of that width.

    Raises:
        FormatError: No layout has this shape.
    """
    layouts = [Layout(bits, old) for old in (False, True)]
    fitting = [layout for layout in layouts if list(shape) == [n, layout.words(k)]]
    if not fitting:
        expected = " or ".join(str([n, words]) for words in sorted({layout.words(k) for layout in layouts}))
        raise FormatError(f"weight_packed has shape {list(shape)}, expected {expected} for {n} x {k} in {bits} bits")
    return fitting[0]  # where both are one, the current layout


def zeros_of(tensors: Mapping[str, Tensor], n: int, groups: int, scheme: QuantScheme, layout: Layout) -> Tensor:
    """Zero points, uint8 ``[N, G]``.

    Packed ones have the layout of the codes. The number of words does not tell: 20 zero points of 3 bits fill two words in both
    layouts, and lie there differently.
    """
    stored = need(tensors, "weight_zero_point", (torch.int32, torch.int8))
    if stored.dtype is torch.int8:
        if stored.numel() == 1:
            stored = stored.view(1, 1).expand(n, 1)
        stored = stored[:, None] if stored.ndim == 1 else stored
        signed = need({"weight_zero_point": stored}, "weight_zero_point", (torch.int8,), (n, groups))
        return codes_of("weight_zero_point", signed, scheme)
    if list(stored.shape) != [layout.words(n), groups]:
        raise FormatError(f"weight_zero_point has shape {list(stored.shape)}, expected {[layout.words(n), groups]}")
    return layout.codes(stored.T, n).T.contiguous()
