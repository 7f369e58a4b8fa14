"""Round to nearest, on the grid with the least squared error: the clipping search of OMSE (arXiv:1902.06822) and AWQ
(arXiv:2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.methods._outliers import outlier_index, outlier_mask
from hf_quant.numerics import quantize, search
from hf_quant.scheme import QuantScheme
from hf_quant.stats import InputStats
from hf_quant.tensor import Outliers, QuantizedTensor

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
        rows = max(1, CHUNK // k)
        importance = None if stats is None else stats.importance.to(weight.device)
        index = None
        if scheme.outliers and scheme.outlier_columns:  # all rows share them
            index = outlier_index(weight.float(), scheme, dtype, importance, self.steps, self.least, importance)
        parts = (self._rows(weight[i : i + rows], scheme, dtype, importance, index) for i in range(0, n, rows))
        return QuantizedTensor.of_rows(parts, n)

    def _rows(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, importance: Tensor | None, index: Tensor | None
    ) -> QuantizedTensor:
        wide, count = weight.float(), scheme.groups(weight.shape[-1])
        if scheme.outliers and index is None:
            index = outlier_index(wide, scheme, dtype, importance, self.steps, self.least)
        outliers = None
        if index is not None:
            outliers = Outliers.gather(wide, index, dtype)
            wide = wide.masked_fill(outlier_mask(index, wide.shape), 0)
        groups = wide.unflatten(-1, (count, -1))  # [n, G, K/G]
        per_group = None if importance is None else importance.view(count, -1)
        scale, zero = search(groups, scheme, dtype, self.steps, self.least, per_group)
        codes = quantize(groups, scale, zero, scheme.qmax).to(torch.uint8).flatten(-2)
        return QuantizedTensor.from_codes(codes, scale.squeeze(-1).to(dtype), zero.squeeze(-1), scheme, outliers)


METHOD = RTN
