"""Several processes that share one job: each sees some of the batches, and solves some of the layers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among the others; alone by default.

    Attributes:
        rank: 0 to ``world - 1``; rank 0 writes.
        world: How many processes there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def found(cls) -> Ranks:
        """Of the process group that ``torchrun`` or ``accelerate launch`` announced; it is made here if need be."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                return cls()
            backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backends, timeout=timedelta(days=1))  # one rank may measure while others wait
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def owner(self, number: int) -> int:
        """Which rank does the piece of work of that number."""
        return number % self.world

    def sum_(self, tensor: Tensor) -> None:
        """Add up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def total(self, *numbers: float) -> list[float]:
        """Each number added up over all ranks."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(sums)
        return sums.tolist()

    def every(self, value: Value) -> list[Value]:
        """The value of each rank, in order."""
        found: list[Any] = [value]
        if self.world > 1:
            found = [None] * self.world
            dist.all_gather_object(found, value)
        return found

    def shared(self, value: Value | None, owner: int = 0) -> Value:
        """What ``owner`` passes, on every rank."""
        box: list[Any] = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=owner)
        made: Value = box[0]
        return made


ALONE = Ranks()
