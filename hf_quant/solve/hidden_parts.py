"""Hidden states in batches of different shapes, as models of images and sounds have them, and models that shrink them on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hf_quant.solve.hidden_states import Call, Carried, HiddenStates


@dataclass(frozen=True)
class HiddenParts(HiddenStates):
    """Hidden states of batches, each of a shape of its own, which a block may change.

    Attributes:
        states: All of them in one row ``[n]``, where they are in a mapped file.
        parts: One tensor a batch, in that row until it outgrows its place there.
    """

    parts: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        entered: Sequence[Tensor],
        calls: Mapping[str, list[Call]],
        carried: Mapping[str, Carried],
        file: Path | None,
    ) -> HiddenParts:
        """Hold a copy of the states of each batch, in memory or in ``file``.

        Raises:
            DiskError: The disk is full.
        """
        if not all(states.is_floating_point() for states in entered):  # token ids, which enter a whole model
            return cls(torch.empty(0, dtype=torch.float32), 1, calls, carried, list(entered))
        row = HiddenStates.room((sum(states.numel() for states in entered),), 1, torch.float32, file).states
        places = row.split([states.numel() for states in entered])
        parts = [place.view(states.shape).copy_(states) for place, states in zip(places, entered, strict=True)]
        return cls(row, 1, calls, carried, parts)

    @property
    def sequences(self) -> int:
        return len(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Tensor:
        return self.parts[number]

    def put(self, number: int, batch: Tensor) -> None:
        """Replace a batch; one of another shape is in memory from then on."""
        if batch.shape == self.parts[number].shape:
            self.parts[number].copy_(batch)
        else:
            self.parts[number] = batch.detach().to("cpu", torch.float32, copy=True)

    def rows(self, number: int) -> int:
        return self.parts[number].numel() // self.parts[number].shape[-1]

    def of_batch(self, number: int, size: int) -> Tensor:
        return self.parts[number]

    def copied(self, file: Path | None) -> HiddenParts:
        calls = {name: list(of_batches) for name, of_batches in self.calls.items()}
        return self.of(self.parts, calls, self.carried, file)
