"""SmoothQuant (arXiv:2211.10438): moves the difficulty of rounding from activations to weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.core.numerics import dequantize, grouped, quantize, quantize_rows
from hf_quant.core.rounding import search
from hf_quant.core.scheme import QuantScheme
from hf_quant.transforms import Stage
from hf_quant.transforms._fold import fold, powers_of_two, rounding_error


@dataclass(frozen=True)
class SmoothQuant:
    """Scales input columns by ``size(x)^alpha / max|w|^(1 - alpha)``.

    Where activations are rounded, each stage searches for the alpha, and for the size of an input (its maximum, as in the paper,
    or its root mean square), with the least output error when both sides are rounded, on the rows seen. Elsewhere the root mean
    square and the fixed ``alpha`` are used, if that reduces the error of rounding the weights.

    Args:
        alpha: Share of the difficulty that moves; 0.5 divides it equally.
        grid: Alphas to try besides no scaling.
        steps: Ranges tried for each row of weights.
        gain: Share of the error that scaling has to save.
    """

    needs_twin: ClassVar[bool] = False
    shared: ClassVar[bool] = True
    alpha: float = 0.5
    grid: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    steps: int = 8
    gain: float = 0.02

    def apply(self, stage: Stage) -> list[str]:
        inputs = stage.stats.importance.sqrt().clamp(min=1e-4)
        columns = torch.stack([stage.weight(n).float().abs().amax(0) for n in stage.layers]).amax(0).clamp(min=1e-5)
        if any(scheme.activations for scheme in stage.layers.values()):
            best = self._search(stage, [inputs, stage.stats.peak.clamp(min=1e-4)], columns)
        else:
            best = self._fixed(stage, _scales(inputs, columns, self.alpha))
        if best is None:
            stage.notes.append("smoothquant: no scales save enough")
            return []
        if (reason := fold(stage, best)) is not None:
            stage.notes.append(f"smoothquant: {reason}")
            return []
        return list(stage.layers)

    def _fixed(self, stage: Stage, scales: Tensor) -> Tensor | None:
        """``scales``; None if they save too little."""
        weights = [(stage.weight(name).float(), scheme) for name, scheme in stage.layers.items()]
        gram = stage.stats.scaled_gram()
        plain, lost = (rounding_error(weights, gram, s, self.steps) for s in (torch.ones_like(scales), scales))
        return scales if lost < (1 - self.gain) * plain else None

    def _search(self, stage: Stage, sizes: list[Tensor], columns: Tensor) -> Tensor | None:
        """The scales with the least error; None if none saves enough."""
        x = torch.cat(stage.stats.sample)
        weights = [(stage.weight(name).float(), scheme) for name, scheme in stage.layers.items()]
        limit, best, chosen = (1 - self.gain) * self._lost(x, weights, torch.ones_like(columns)), None, 0.0
        for size in sizes:
            for alpha in self.grid:
                scales = _scales(size, columns, alpha)
                lost = self._lost(x, weights, scales)
                if lost < limit:
                    limit, best, chosen = lost, scales, alpha
        if best is not None:
            stage.notes.append(f"smoothquant: alpha {chosen:g}")
        return best

    def _lost(self, x: Tensor, weights: list[tuple[Tensor, QuantScheme]], scales: Tensor) -> float:
        """Squared error of the outputs of all layers with rounded activations and weights."""
        total, rounded = 0.0, {}
        for W, scheme in weights:
            if scheme.activations not in rounded:
                rounded[scheme.activations] = _inputs(x / scales, scheme)
            groups = grouped(W * scales, scheme)
            scale, zero = search(groups, scheme, torch.float32, self.steps, 0.6)
            rounded_weight = dequantize(quantize(groups, scale, zero, scheme), scale, zero).flatten(1)[:, : W.shape[1]]
            total += (
                (rounded[scheme.activations] @ rounded_weight.T - x @ W.T).square().sum(dtype=torch.float64).item()
            )
        return total


def _inputs(x: Tensor, scheme: QuantScheme) -> Tensor:
    """The rounded activations that a kernel multiplies in place of ``x [n, K]``."""
    if scheme.activations is None:
        return x
    if scheme.outlier_columns:  # not rounded
        outlier_columns = x.square().mean(0).topk(scheme.outlier_count(x.shape[1])).indices
        codes, scale = quantize_rows(x.index_fill(1, outlier_columns, 0))
        return (codes * scale).index_copy_(1, outlier_columns, x[:, outlier_columns])
    codes, scale = quantize_rows(x, x.abs().amax() / 127 if scheme.activations == "tensor" else None)
    return codes * scale


def _scales(inputs: Tensor, columns: Tensor, alpha: float) -> Tensor:
    return powers_of_two(inputs**alpha / columns ** (1 - alpha))


TRANSFORM = SmoothQuant
