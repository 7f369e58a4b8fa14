"""K-quants of llama.cpp as data: blocks of 256 columns whose groups have small whole numbers for scales and offsets.

``w = d * scale * (code - zero)`` or ``w = d * scale * code - dmin * offset``, with one float16 ``d`` and ``dmin`` a block. Where
their bits lie in a file is in `hf_quant.gguf.blocks`. This module needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = 256  # of a block


@dataclass(frozen=True)
class KQuant:
    """A type of blocks.

    Attributes:
        bits: Of a code in a file.
        held_in: Bits of a code here: 5 and 6 are held in 8.
        group: Columns that share a scale.
        scales: Least and largest whole number for a scale.
        offset: Largest whole number for an offset; 0 without offsets, where codes have a center instead.
    """

    bits: int
    held_in: int
    group: int
    scales: tuple[int, int]
    offset: int = 0

    @property
    def groups(self) -> int:
        """In one block."""
        return COLUMNS // self.group

    @property
    def codes(self) -> tuple[int, int]:
        """The least and the largest code, as they are held here: around the center of the wider code, if there is one."""
        least = 0 if self.offset else (1 << self.held_in >> 1) - (1 << self.bits >> 1)
        return least, least + (1 << self.bits) - 1

    @property
    def bits_per_weight(self) -> float:
        """In a file."""
        widths = (self.scales[1] - self.scales[0]).bit_length() + self.offset.bit_length()
        return self.bits + widths / self.group + (32 if self.offset else 16) / COLUMNS


K_QUANTS = {
    "Q2_K": KQuant(2, 2, 16, (0, 15), 15),
    "Q3_K": KQuant(3, 3, 16, (-32, 31)),
    "Q4_K": KQuant(4, 4, 32, (0, 63), 63),
    "Q5_K": KQuant(5, 8, 32, (0, 63), 63),
    "Q6_K": KQuant(6, 8, 16, (-128, 127)),
}
