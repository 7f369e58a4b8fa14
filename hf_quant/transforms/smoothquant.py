"""SmoothQuant (arXiv:2211.10438): moves what is hard to round from the activations into the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_quant.transforms import Stage
from hf_quant.transforms._fold import fold, powers_of_two


@dataclass(frozen=True)
class SmoothQuant:
    """Scale input columns by ``size(x)^alpha / max|w|^(1 - alpha)``; the size of an input is its root mean square.

    Args:
        alpha: How much of the difficulty moves; 0.5 shares it.
    """

    needs_twin: ClassVar[bool] = False
    alpha: float = 0.5

    def apply(self, stage: Stage) -> None:
        inputs = stage.stats.importance.sqrt().clamp(min=1e-4)
        columns = torch.stack([stage.weight(n).float().abs().amax(0) for n in stage.layers]).amax(0).clamp(min=1e-5)
        reason = fold(stage, powers_of_two(inputs**self.alpha / columns ** (1 - self.alpha)))
        if reason is not None:
            stage.notes.append(f"smoothquant: {reason}")


TRANSFORM = SmoothQuant
