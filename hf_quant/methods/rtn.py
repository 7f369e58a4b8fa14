"""Round to nearest, on the grid with the least squared error: the clipping search of OMSE (arXiv:1902.06822) and AWQ
(arXiv:2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.numerics import quantize, search
from hf_quant.scheme import QuantScheme
from hf_quant.stats import InputStats
from hf_quant.tensor import QuantizedTensor

CHUNK = 1 << 20  # weights searched together: bounds the float32 working memory to a few tens of MB


@dataclass(frozen=True)
class RTN:
    """Each weight goes to its nearest code; needs no data, and weighs columns by their inputs where it has seen them.

    Args:
        steps: Ranges tried per group, from the full one down to ``least`` of it; 0 is plain min/max rounding.
        least: Smallest share of the range tried.
    """

    calibrated: ClassVar[bool] = False
    steps: int = 20
    least: float = 0.6

    def quantize(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, stats: InputStats | None = None
    ) -> QuantizedTensor:
        n, k = weight.shape
        rows, groups = max(1, CHUNK // k), scheme.groups(k)
        importance = None if stats is None else stats.importance.to(weight.device).view(groups, -1)
        qweight = weight.new_empty(n, scheme.packed_bytes(k), dtype=torch.uint8)
        scale = weight.new_empty(n, groups, dtype=dtype)
        zero = None if scheme.symmetric else weight.new_empty(n, groups, dtype=torch.uint8)
        for i in range(0, n, rows):
            part = self._rows(weight[i : i + rows], scheme, dtype, importance)
            qweight[i : i + rows], scale[i : i + rows] = part.qweight, part.scale
            if zero is not None:
                zero[i : i + rows] = part.zeros()
        return QuantizedTensor(qweight, scale, zero, scheme)

    def _rows(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, importance: Tensor | None
    ) -> QuantizedTensor:
        groups = weight.float().unflatten(-1, (scheme.groups(weight.shape[-1]), -1))  # [n, G, K/G]
        scale, zero = search(groups, scheme, dtype, self.steps, self.least, importance)
        codes = quantize(groups, scale, zero, scheme.qmax).to(torch.uint8).flatten(-2)
        return QuantizedTensor.from_codes(codes, scale.squeeze(-1).to(dtype), zero.squeeze(-1), scheme)


METHOD = RTN
