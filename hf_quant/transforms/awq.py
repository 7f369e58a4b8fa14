"""AWQ, activation-aware weight quantization (arXiv:2306.00978): columns with large inputs get a larger share of the grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_quant.transforms import Stage
from hf_quant.transforms._fold import fold, powers_of_two, rounding_error

ROWS = 1024  # of the layers that share an input, all together, on which scales are compared


@dataclass(frozen=True)
class AWQ:
    """Scales input columns by ``rms(x)^a / rms(w)^b``, with the a and b that lose least when the weights are rounded.

    Args:
        grid: Pairs (a, b) to try besides no scaling.
        steps: Ranges tried for each group, so that clipping is part of the search.
        gain: Share of the error that scaling has to save.
    """

    needs_twin: ClassVar[bool] = False
    shared: ClassVar[bool] = True
    grid: tuple[tuple[float, float], ...] = (
        (0.25, 0),
        (0.5, 0),
        (0.75, 0),
        (0.25, 0.5),
        (0.5, 0.5),
        (0.75, 0.5),
        (1, 1),
    )
    steps: int = 8
    gain: float = 0.02

    def apply(self, stage: Stage) -> list[str]:
        weights = [(stage.weight(name).float(), scheme) for name, scheme in stage.layers.items()]
        every = -(-sum(len(w) for w, _ in weights) // ROWS)
        inputs = stage.stats.importance.sqrt().clamp(min=1e-4)
        columns = torch.stack([w.square().mean(0) for w, _ in weights]).mean(0).sqrt()
        columns = (columns / columns.mean()).clamp(min=1e-4)
        weights = [(w[::every], scheme) for w, scheme in weights]
        gram = stage.stats.scaled_gram()
        least = rounding_error(weights, gram, torch.ones_like(inputs), self.steps)
        limit, best = (1 - self.gain) * least, None
        for a, b in self.grid:
            scales = powers_of_two(inputs**a / columns**b)
            lost = rounding_error(weights, gram, scales, self.steps)
            if lost < limit:
                limit, best = lost, scales
        if best is None:
            stage.notes.append("awq: no scales save enough")
            return []
        if (reason := fold(stage, best)) is not None:
            stage.notes.append(f"awq: {reason}")
            return []
        return list(stage.layers)


TRANSFORM = AWQ
