"""Scales in two levels, as their files have them: small codes for groups, and a number for a larger part of a row.

K-quants: ``scale = unit * (code - least)``, and ``offset * unit`` is subtracted. NVFP4: ``scale = code / unit``, a code being the bits
of an E4M3 number, and the unit one number for the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hf_quant.core.k_quants import KQuant
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.two_levels import multiples
from hf_quant.errors import SchemeError


@dataclass(frozen=True, slots=True)
class CodedScales:
    """The scales, and the zero points, of a weight ``[..., N, K]`` in G groups and B larger parts a row.

    Attributes:
        code: uint8 ``[..., N, G]``.
        unit: Floating point ``[..., N, B]``.
        offset: uint8 ``[..., N, G]``; None without offsets.
        offset_unit: Floating point ``[..., N, B]``; None without offsets.
    """

    code: Tensor
    unit: Tensor
    offset: Tensor | None = None
    offset_unit: Tensor | None = None

    def scale(self, scheme: QuantScheme) -> Tensor:
        """float32 ``[..., N, G]``: what a step of the code is worth."""
        unit = _spread(self.unit.float(), self.code)
        if scheme.k_quant is None:
            return self.code.view(torch.float8_e4m3fn).float() / unit
        return unit * (self.code.float() + scheme.k_quant.scales[0])

    def zero_point(self, scale: Tensor) -> Tensor | None:
        """float32 ``[..., N, G]``, for the scales that `scale` gives; None without offsets."""
        offset = self.subtracted()
        return None if offset is None else offset / scale

    def subtracted(self) -> Tensor | None:
        """float32 ``[..., N, G]``: what is subtracted from scaled codes; None without offsets."""
        if self.offset is None or self.offset_unit is None:
            return None
        return _spread(self.offset_unit.float(), self.offset) * self.offset.float()

    def parts(self) -> Iterator[Tensor]:
        """The tensors, in the order of the fields."""
        yield from (part for field in fields(self) if isinstance(part := getattr(self, field.name), Tensor))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> CodedScales:
        """The same of changed tensors."""
        return CodedScales(*map(change, self.parts()))

    @classmethod
    def joined(cls, scales: Sequence[CodedScales], join: Callable[[list[Tensor]], Tensor]) -> CodedScales:
        """Of several weights, by `torch.cat` or `torch.stack`."""
        return cls(*(join(list(parts)) for parts in zip(*(one.parts() for one in scales), strict=True)))


def recovered(scale: Tensor, zero: Tensor | None, scheme: QuantScheme) -> CodedScales:
    """The codes of scales that are whole multiples of a float16 for every block, to the last bit.

    Raises:
        SchemeError: They are not.
    """
    kind = scheme.k_quant
    coded = None if kind is None else _multiples(scale, zero, kind)
    if coded is None:
        raise SchemeError(f"{scheme}: the scales are in no two levels that it has")
    return coded


def _multiples(scale: Tensor, zero: Tensor | None, kind: KQuant) -> CodedScales | None:
    rows = scale.float().reshape(-1, scale.shape[-1]).unflatten(-1, (-1, kind.groups))
    if (whole := multiples(rows, *kind.scales)) is None:
        return None
    lead = scale.shape[:-1]
    code, unit = (whole[1] - kind.scales[0]).to(torch.uint8).view(*lead, -1), whole[0].view(*lead, -1)
    if zero is None:
        return CodedScales(code, unit)
    zeros = zero.float().reshape(rows.shape)
    if (whole := multiples(zeros.double() * rows.double(), 0, kind.offset, rows, zeros)) is None:
        return None
    return CodedScales(code, unit, whole[1].to(torch.uint8).view(*lead, -1), whole[0].view(*lead, -1))


def _spread(units: Tensor, codes: Tensor) -> Tensor:
    """``[..., N, B]`` to the shape of ``codes``, ``[..., N, G]``."""
    return units.repeat_interleave(codes.shape[-1] // units.shape[-1], -1)
