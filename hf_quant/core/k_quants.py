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
        bits: Of a code.
        group: Columns that share a scale.
        scales: Least and largest whole number for a scale.
        offset: Largest whole number for an offset; 0 without offsets, where codes have a center instead.
    """

    bits: int
    group: int
    scales: tuple[int, int]
    offset: int = 0

    @property
    def groups(self) -> int:
        """In one block."""
        return COLUMNS // self.group

    @property
    def bits_per_weight(self) -> float:
        """In a file."""
        widths = (self.scales[1] - self.scales[0]).bit_length() + self.offset.bit_length()
        return self.bits + widths / self.group + (32 if self.offset else 16) / COLUMNS


K_QUANTS = {
    "Q2_K": KQuant(2, 16, (0, 15), 15),
    "Q3_K": KQuant(3, 16, (-32, 31)),
    "Q4_K": KQuant(4, 32, (0, 63), 63),
    "Q5_K": KQuant(5, 32, (0, 63), 63),
    "Q6_K": KQuant(6, 16, (-128, 127)),
}
