"""HQQ, half-quadratic quantization: https://mobiusml.github.io/hqq_blog (Badri and Shaji, 2023); needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.core.numerics import dequantize, floored, minmax, quantize
from hf_quant.core.rounding import search
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.methods._nearest import best, better, judged
from hf_quant.methods._outliers import outlier_index, outlier_mask

CHUNK = 1 << 20  # weights that are optimized together
STEPS, LEAST = 20, 0.6  # of the search for the grid of rounding to nearest


@dataclass(frozen=True)
class HQQ:
    """Minimizes ``sum |w - w_q|^p`` for p < 1, which tolerates the few large errors of outliers.

    Half-quadratic splitting: ``e``, the tolerated error, is ``w - w_q`` after shrinkage; then scale and zero point are the least-squares
    solution for ``w - e``. The paper changes only the zero point, which is real there and an integer here, so the scale changes
    too, and each group keeps its best iteration.

    Args:
        p: Exponent of the error.
        beta: Weight of the splitting, multiplied by ``kappa`` in each iteration.
        kappa: See ``beta``.
        rounds: Largest number of iterations.
    """

    calibrated: ClassVar[bool] = False
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20

    def quantize(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, stats: InputStats | None = None
    ) -> QuantizedTensor:
        inputs = None if stats is None else stats.importance.to(weight.device)
        columns = None
        if scheme.outliers and scheme.outlier_columns:
            columns = outlier_index(weight.float(), scheme, dtype, None, STEPS, LEAST, inputs)
        parts = (self._rows(part, scheme, dtype, columns) for part in weight.split(max(1, CHUNK // weight.shape[1])))
        quantized = QuantizedTensor.of_rows(parts, weight.shape[0])
        if stats is None:
            return quantized
        others = best(weight, scheme, dtype, STEPS, LEAST, stats, columns)
        return better(judged(weight, stats, quantized), others).quantized

    def _rows(self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, index: Tensor | None) -> QuantizedTensor:
        wide, outliers = weight.float(), None
        if scheme.outliers and index is None:
            index = outlier_index(wide, scheme, dtype, None, STEPS, LEAST)
        if index is not None:
            outliers = Outliers.gather(wide, index, dtype)
            wide = wide.masked_fill(outlier_mask(index, wide.shape), 0)
        groups = wide.unflatten(-1, (scheme.groups(wide.shape[-1]), -1))
        scale, zero = self._fit(groups, scheme, dtype)
        codes = quantize(groups, scale, zero, scheme).to(torch.uint8).flatten(-2)
        return QuantizedTensor.from_codes(codes, scale.squeeze(-1).to(dtype), zero.squeeze(-1), scheme, outliers)

    def _fit(self, W: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        best_fit = search(W, scheme, dtype, STEPS, LEAST)  # rounding to nearest, which the result must improve on
        least = self._lost(W - dequantize(quantize(W, *best_fit, scheme), *best_fit))
        scale, zero = minmax(W, scheme)
        scale, beta = floored(scale, dtype), self.beta
        for _ in range(self.rounds):
            codes = quantize(W, scale, zero, scheme)
            off = W - dequantize(codes, scale, zero)
            size = off.abs()
            lost = self._lost(off)
            gained = lost < least
            least = torch.where(gained, lost, least)
            best_fit = torch.where(gained, scale, best_fit[0]), torch.where(gained, zero, best_fit[1])
            e = off.sign() * (size - size.clamp(min=1e-8).pow(self.p - 1) / beta).clamp(min=0)
            beta *= self.kappa
            steps = codes - zero
            fitted = ((W - e) * steps).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True).clamp(min=1)
            scale = floored(torch.where(fitted > 0, fitted, scale), dtype)
            if not scheme.symmetric:
                zero = (codes - (W - e) / scale).mean(-1, keepdim=True).round().clamp(0, scheme.qmax)
        return best_fit

    def _lost(self, off: Tensor) -> Tensor:
        return off.abs().pow(self.p).sum(-1, keepdim=True)


METHOD = HQQ
