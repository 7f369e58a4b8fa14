"""What a quantized weight looks like, as data: no tensors, no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hf_quant.errors import SchemeError

BITS = (2, 3, 4, 8)
MULTIPLE = 32  # in_features must be a multiple of this: 32 codes of any width fill whole int32 words
_SLUG = re.compile(r"W(?P<bits>\d)A16-g(?P<group>\d{1,5}|-1)(?P<asym>-asym)?")


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """One weight matrix ``[N, K]`` (out_features, in_features) in integers.

    Args:
        bits: Width of one code; one of 2, 3, 4, 8.
        group_size: Consecutive input columns that share one scale, a power of two from 16; -1 means all K columns.
        symmetric: Whether the zero point is fixed at ``2 ** (bits - 1)`` and not stored.

    Raises:
        SchemeError: A value is outside what this package can hold.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise SchemeError(f"bits must be one of {BITS}, got {self.bits!r}")
        size = self.group_size
        if type(size) is not int or (size != -1 and (size < 16 or size & (size - 1))):
            raise SchemeError(f"group_size must be -1 or a power of two from 16, got {size!r}")
        if type(self.symmetric) is not bool:
            raise SchemeError(f"symmetric must be True or False, got {self.symmetric!r}")

    @property
    def qmax(self) -> int:
        """Largest code; codes run over ``0..qmax``."""
        return (1 << self.bits) - 1

    @property
    def zero(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of ``in_features`` columns."""
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size:
            raise SchemeError(f"group_size {size} does not divide in_features {in_features}")
        return in_features // size

    def packed_bytes(self, in_features: int) -> int:
        """Bytes of one row of packed codes."""
        return in_features * self.bits // 8

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Codes, scales and zero points, per weight."""
        per_group = scale_bits + (0 if self.symmetric else 8)
        return self.bits + per_group * self.groups(in_features) / in_features

    def fitted(self, in_features: int) -> QuantScheme:
        """This scheme, or the same with the largest smaller group size that divides ``in_features``.

        Raises:
            SchemeError: ``in_features`` is not a multiple of 32, so no group size fits.
        """
        if in_features % MULTIPLE:
            raise SchemeError(f"in_features {in_features} is not a multiple of {MULTIPLE}")
        size = self.group_size
        while size != -1 and in_features % size:
            size //= 2
        return replace(self, group_size=size)

    def __str__(self) -> str:
        return f"W{self.bits}A16-g{self.group_size}" + ("" if self.symmetric else "-asym")

    @classmethod
    def parse(cls, slug: str) -> QuantScheme:
        """Inverse of ``str``: ``QuantScheme.parse("W4A16-g128-asym")``."""
        match = _SLUG.fullmatch(slug) if isinstance(slug, str) else None
        if match is None:
            raise SchemeError(f"not a scheme: {slug!r} (for example 'W4A16-g128-asym')")
        return cls(int(match["bits"]), int(match["group"]), match["asym"] is None)
