"""Round to nearest, on the grid with the least squared error: the clipping search of OMSE (arXiv:1902.06822) and AWQ
(arXiv:2306.00978), without inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.numerics import dequantize, floored, minmax, quantize
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import QuantizedTensor

CHUNK = 1 << 20  # weights searched together: bounds the float32 working memory to a few tens of MB


@dataclass(frozen=True)
class RTN:
    """Each weight goes to its nearest code; needs no data.

    Args:
        steps: Ranges tried per group, from the full one down to ``least`` of it; 0 is plain min/max rounding.
        least: Smallest share of the range tried.
    """

    steps: int = 20
    least: float = 0.6

    def quantize(self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> QuantizedTensor:
        n, k = weight.shape
        rows, groups = max(1, CHUNK // k), scheme.groups(k)
        qweight = weight.new_empty(n, scheme.packed_bytes(k), dtype=torch.uint8)
        scale = weight.new_empty(n, groups, dtype=dtype)
        zero = None if scheme.symmetric else weight.new_empty(n, groups, dtype=torch.uint8)
        for i in range(0, n, rows):
            part = self._rows(weight[i : i + rows], scheme, dtype)
            qweight[i : i + rows], scale[i : i + rows] = part.qweight, part.scale
            if zero is not None:
                zero[i : i + rows] = part.zeros()
        return QuantizedTensor(qweight, scale, zero, scheme)

    def _rows(self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> QuantizedTensor:
        groups = weight.float().unflatten(-1, (scheme.groups(weight.shape[-1]), -1))  # [n, G, K/G]
        scale, zero = minmax(groups, scheme)
        scale = floored(scale, dtype)
        if self.steps:
            scale, zero = self._search(groups, scale, zero, scheme, dtype)
        codes = quantize(groups, scale, zero, scheme.qmax).to(torch.uint8).flatten(-2)
        return QuantizedTensor.from_codes(codes, scale.squeeze(-1).to(dtype), zero.squeeze(-1), scheme)

    def _search(
        self, groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The best of ``steps`` shrunk ranges per group, the zero point moved along with each."""
        widest, best = scale, torch.full_like(scale, torch.inf)
        low = -zero * scale  # the real value of code 0 in the full range
        for share in torch.linspace(1, self.least, self.steps).tolist():
            tried = floored(widest * share, dtype)
            moved = zero if scheme.symmetric else torch.round(-low * share / tried).clamp(0, scheme.qmax)
            made = dequantize(quantize(groups, tried, moved, scheme.qmax), tried, moved)
            error = made.sub_(groups).square_().sum(-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, tried, scale)
            zero = torch.where(better, moved, zero)
        return scale, zero


METHOD = RTN
