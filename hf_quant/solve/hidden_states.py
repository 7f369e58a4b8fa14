"""The hidden states that walk up a model: in memory, or in a file that the system keeps out of the way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_quant.disk.atomic import blaming


@dataclass(frozen=True)
class Activations:
    """``[S, T, d]``, some sequences at a time.

    Attributes:
        states: All of them.
        size: Sequences in a batch; the last one may have fewer.
    """

    states: Tensor
    size: int

    @classmethod
    def room(cls, shape: tuple[int, int, int], size: int, dtype: torch.dtype, file: Path | None) -> Activations:
        """Nothing yet; in ``file`` (mapped, so its pages are not this process's memory) or, where it is None, in memory.

        Raises:
            DiskError: The disk is full.
        """
        count = shape[0] * shape[1] * shape[2]
        if file is None:
            return cls(torch.empty(shape, dtype=dtype), size)
        nbytes = count * dtype.itemsize
        with blaming(file, nbytes), file.open("wb") as made:
            _reserve(made.fileno(), nbytes)
        return cls(torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape), size)

    def __len__(self) -> int:
        return (self.states.shape[0] + self.size - 1) // self.size

    def __getitem__(self, number: int) -> Tensor:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.states[number * self.size : (number + 1) * self.size]

    def put(self, number: int, batch: Tensor) -> None:
        """Replace a batch."""
        self.states[number * self.size : (number + 1) * self.size] = batch

    def copy_from(self, other: Activations) -> None:
        """Take over all states of another one."""
        for number in range(len(self)):
            self.put(number, other[number])


def _reserve(handle: int, size: int) -> None:
    """Claim the disk space now: running out of it while pages are written back kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)
