"""The hidden states of all calibration sequences at one depth of the model, in memory or in a mapped file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_quant.data.held_windows import held_from_learning
from hf_quant.disk.atomic import blaming

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a block besides hidden states
Carried = Mapping[int | str, int]  # the place or name of an argument to its place in what the block before returned


class Batch(NamedTuple):
    """Hidden states of some sequences, and the block's other arguments for them; None where all batches share those.

    ``carry`` is called with all that the block returns, of which the next block takes more than hidden states.
    """

    states: Tensor
    call: Call | None = None
    carry: Callable[[Any], None] | None = None

    @property
    def undivided(self) -> bool:
        """Whether its other arguments are for all of its sequences together, so that it runs as a whole."""
        return self.call is not None


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states ``[S, T, ...]``, read and replaced in batches.

    Attributes:
        states: All of them.
        size: Sequences in a batch; the last one may have fewer.
        calls: Name of each block to its other arguments for each batch; empty where all batches share them.
        carried: Name of each block to the arguments that it takes from what the block before returned.
    """

    states: Tensor
    size: int
    calls: Mapping[str, list[Call]] = field(default_factory=dict)
    carried: Mapping[str, Carried] = field(default_factory=dict)

    @classmethod
    def room(cls, shape: tuple[int, ...], size: int, dtype: torch.dtype, file: Path | None) -> HiddenStates:
        """Uninitialized states, in memory, or in ``file``, which is mapped and so does not count as memory of this process.

        Raises:
            DiskError: The disk is full.
        """
        count = math.prod(shape)
        if file is None:
            return cls(torch.empty(shape, dtype=dtype), size)
        nbytes = count * dtype.itemsize
        with blaming(file, nbytes), file.open("wb") as handle:
            _reserve(handle.fileno(), nbytes)
        return cls(torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape), size)

    def __len__(self) -> int:
        return (self.states.shape[0] + self.size - 1) // self.size

    def __getitem__(self, number: int) -> Tensor:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.states[number * self.size : (number + 1) * self.size]

    @property
    def sequences(self) -> int:
        """Number of sequences, or of batches that are held out as a whole."""
        return self.states.shape[0]

    def held_out(self) -> list[int]:
        """The batches with sequences that nothing may be learned from; none if that would leave nothing."""
        held = held_from_learning(self.sequences).split(self.size)
        numbers = [number for number, batch in enumerate(held) if bool(batch.any())]
        return numbers if len(numbers) < len(self) else []

    def batch(self, number: int, block: str) -> Batch:
        """A batch with the arguments of a block."""
        calls = self.calls.get(block)
        if calls is None:
            return Batch(self[number])
        names = list(self.calls)
        after = names[names.index(block) + 1 :]
        carry = partial(self._carry, number, after[0]) if after and self.carried.get(after[0]) else None
        return Batch(self[number], calls[number], carry)

    def _carry(self, number: int, block: str, returned: Any) -> None:
        """Put what the block before returned for a batch among the arguments of a block."""
        args, kwargs = self.calls[block][number]
        new = {key: returned[place].detach() for key, place in self.carried[block].items()}
        self.calls[block][number] = (
            tuple(new.get(place, value) for place, value in enumerate(args)),
            {name: new.get(name, value) for name, value in kwargs.items()},
        )

    def put(self, number: int, batch: Tensor) -> None:
        """Replace a batch."""
        self.states[number * self.size : (number + 1) * self.size] = batch

    def rows(self, number: int) -> int:
        """Number of tokens in a batch."""
        return self[number].shape[:2].numel()

    def of_batch(self, number: int, size: int) -> Tensor:
        """The states of the sequences in a batch, if batches had ``size`` sequences."""
        return self.states[number * size : (number + 1) * size]

    def copied(self, file: Path | None) -> HiddenStates:
        """A copy of all, in memory or in ``file``."""
        states = HiddenStates.room(tuple(self.states.shape), self.size, self.states.dtype, file)
        for number in range(len(self)):
            states.put(number, self[number])
        return replace(states, calls={name: list(calls) for name, calls in self.calls.items()}, carried=self.carried)


def _reserve(handle: int, size: int) -> None:
    """Allocate the disk space now: if the disk is full when mapped pages are written, the process is killed."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)
