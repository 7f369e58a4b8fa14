"""The one value every method makes, every format stores and every kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.errors import SchemeError
from hf_quant.numerics import levels
from hf_quant.packing import pack, unpack
from hf_quant.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight matrix ``[N, K]`` in codes, or a stack of them with leading axes ``...``.

    Attributes:
        qweight: uint8 ``[..., N, K / 8 * bits]``, packed along K by `packing.pack`.
        scale: ``[..., N, G]`` floating point, G = ``scheme.groups(K)``.
        zero_point: uint8 (with ``real_zero``: like the scale) ``[..., N, G]``, or None where the scheme is symmetric.
        scheme: How to read the three.
        perm: int32 ``[..., S, K]`` where the scheme is permuted: column j of the codes is column ``perm[s, j]`` of the
            weight, in the s-th of S equal parts of the rows (the gate and up halves of a stack, else S is 1).
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: QuantScheme
    perm: Tensor | None = None

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> QuantizedTensor:
        """Pack ``codes`` ``[..., N, K]``, K a multiple of 32; the zero point is dropped where the scheme fixes it."""
        if codes.shape[-1] % 32:
            raise SchemeError(f"in_features must be a multiple of 32, got {codes.shape[-1]}")
        zero = None if scheme.symmetric else zero_point.to(torch.uint8)
        return cls(pack(codes, scheme.bits), scale, zero, scheme)

    @property
    def in_features(self) -> int:
        """K, which the packed width tells."""
        return self.qweight.shape[-1] * 8 // self.scheme.bits

    def codes(self) -> Tensor:
        """uint8 ``[..., N, K]``, in the order they are stored in."""
        return unpack(self.qweight, self.scheme.bits)

    def zeros(self) -> Tensor:
        """``[..., N, G]``, whether stored or fixed."""
        if self.zero_point is not None:
            return self.zero_point
        return torch.full_like(self.scale, self.scheme.zero, dtype=torch.uint8)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights ``[..., N, K]``, computed in float32 (float64 if asked for) and rounded once to ``dtype``."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        groups = self.codes().unflatten(-1, (self.scale.shape[-1], -1))
        if self.scheme.codebook is None:
            real = groups.to(wide) - self.zeros().to(wide)[..., None]
        else:
            real = levels(self.scheme.codebook, groups.device).to(wide)[groups.int()]
        made = (real * self.scale.to(wide)[..., None]).flatten(-2).to(dtype or self.scale.dtype)
        return made if self.perm is None else in_order(made, self.perm)


def in_order(columns: Tensor, perm: Tensor) -> Tensor:
    """``[..., N, K]`` with its columns back in the order of the weight; ``perm [..., S, K]`` as in `QuantizedTensor`."""
    parts = columns.unflatten(-2, (perm.shape[-2], -1))
    return parts.gather(-1, perm.argsort(-1).unsqueeze(-2).expand_as(parts)).flatten(-3, -2)
