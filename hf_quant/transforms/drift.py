"""Targets from the float model: each layer compensates for the error of the layers before it. GPTAQ (arXiv:2504.02692),
Qronos (arXiv:2505.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_quant.transforms import Stage


@dataclass(frozen=True)
class Drift:
    """Moves each weight towards `InputStats.target` as far as that helps on held-out rows, and so changes the function."""

    needs_twin: ClassVar[bool] = True
    shared: ClassVar[bool] = False

    def apply(self, stage: Stage) -> list[str]:
        changed = []
        for name in stage.layers:
            moved, blend = stage.stats.target(stage.weight(name))
            stage.weight(name).copy_(moved)
            stage.notes.append(f"drift: {name} {blend:.2f}")
            changed += [name] if blend else []
        return changed


TRANSFORM = Drift
