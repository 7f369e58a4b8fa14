"""Round to nearest, on the grid with the least squared error: the clipping search of OMSE (arXiv:1902.06822) and AWQ
(arXiv:2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.methods._nearest import best, nearest


@dataclass(frozen=True)
class RTN:
    """Rounds each weight to its nearest code; works without data, and weights columns by their inputs where that helps.

    Args:
        steps: Ranges tried for each group, from the full one down to ``least`` of it; 0 is plain min/max rounding.
        least: Smallest share of the range tried.
    """

    calibrated: ClassVar[bool] = False
    two_levels: ClassVar[bool] = True
    steps: int = 20
    least: float = 0.6

    def quantize(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, stats: InputStats | None = None
    ) -> QuantizedTensor:
        if stats is None:
            return nearest(weight, scheme, dtype, self.steps, self.least)
        return best(weight, scheme, dtype, self.steps, self.least, stats).quantized


METHOD = RTN
