"""Several processes that share one job: each runs some of the batches and solves some of the layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_quant.core.private_torch import tree_map_only
from hf_quant.errors import HfQuantError

Value = TypeVar("Value")
MINUTES = 30  # that a process waits for the others within a block; the largest layers take a few minutes
PATIENCE = timedelta(days=1)  # for the time between models, while the first process measures


@dataclass(frozen=True)
class Ranks:
    """This process among the others; by default it is the only one.

    Attributes:
        rank: 0 to ``world - 1``; rank 0 writes the output.
        world: Number of processes.
        patient: A process group with a long timeout, for while a model is measured; None for a single process.

    Raises:
        HfQuantError: From every method, if other processes have ended or do not answer in time.
    """

    rank: int = 0
    world: int = 1
    patient: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of_process_group(cls, minutes: float = MINUTES) -> Ranks:
        """The ranks of the process group of ``torchrun`` or ``accelerate launch``, which is initialized if needed.

        Args:
            minutes: How long a process waits for the others.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                return cls()
            backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backends, timeout=timedelta(minutes=minutes))
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def first(self) -> bool:
        """Whether this process writes the output."""
        return self.rank == 0

    def owner(self, number: int) -> int:
        """The rank that does a piece of work, by its number."""
        return number % self.world

    def sum_(self, tensor: Tensor) -> None:
        """Sum over all ranks, in place."""
        if self.world > 1:
            with self._answered():
                dist.all_reduce(tensor)

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over all ranks."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(sums)
        return sums.tolist()

    def every(self, value: Value, device: torch.device | str = "cpu") -> list[Value]:
        """The values of all ranks, in order, with their tensors moved to ``device``."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self._answered():
            dist.all_gather_object(values, _on("cpu", value))
        return [_on(device, value_of_rank) for value_of_rank in values]

    def shared(self, value: Value | None, owner: int = 0) -> Value:
        """The value of rank ``owner``, on all ranks; its tensors are moved to main memory if there are several ranks."""
        if self.world == 1:
            assert value is not None
            return value
        box: list[Any] = [_on("cpu", value) if owner == self.rank else None]
        with self._answered():
            dist.broadcast_object_list(box, src=owner)
        shared: Value = box[0]
        return shared

    def barrier(self, *, patient: bool = False) -> None:
        """Wait for all ranks; ``patient`` if one of them may have been measuring a model for hours."""
        if self.world > 1 and patient:
            with self._answered():
                dist.barrier(self.patient)
        else:
            self.total(0)

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise HfQuantError(
                f"rank {self.rank} of {self.world}: the other processes do not answer; one has ended, or is at something "
                f"else: look at what it said ({reason})"
            ) from error


def _on(device: torch.device | str, value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


ALONE = Ranks()
