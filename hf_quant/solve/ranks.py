"""Several processes that share one job: each sees some of the batches, and solves some of the layers."""

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
MINUTES = 30  # that one process waits for the others within a block: the largest layers take a few
PATIENCE = timedelta(days=1)  # between models, while the first process measures


@dataclass(frozen=True)
class Ranks:
    """This process among the others; alone by default.

    Attributes:
        rank: 0 to ``world - 1``; rank 0 writes.
        world: How many processes there are.
        patient: Group of the same processes that waits for as long as measuring a model takes; None if they are alone.

    Raises:
        HfQuantError: From every method, where the other processes do not answer in time, or have ended.
    """

    rank: int = 0
    world: int = 1
    patient: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def found(cls, minutes: float = MINUTES) -> Ranks:
        """Of the process group that ``torchrun`` or ``accelerate launch`` announced; it is made here if need be.

        Args:
            minutes: How long one process waits for an answer of the others before it gives up.
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
        """Whether this is the process that writes."""
        return self.rank == 0

    def owner(self, number: int) -> int:
        """Which rank does the piece of work of that number."""
        return number % self.world

    def sum_(self, tensor: Tensor) -> None:
        """Add up over all ranks, in place."""
        if self.world > 1:
            with self._answered():
                dist.all_reduce(tensor)

    def total(self, *numbers: float) -> list[float]:
        """Each number added up over all ranks."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(sums)
        return sums.tolist()

    def every(self, value: Value, device: torch.device | str = "cpu") -> list[Value]:
        """The value of each rank, in order; tensors in it come to ``device``, wherever the other ranks have theirs."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self._answered():
            dist.all_gather_object(found, _on("cpu", value))
        return [_on(device, each) for each in found]

    def shared(self, value: Value | None, owner: int = 0) -> Value:
        """What ``owner`` passes, on every rank; tensors in it come to main memory where there are several ranks."""
        if self.world == 1:
            assert value is not None
            return value
        box: list[Any] = [_on("cpu", value) if owner == self.rank else None]
        with self._answered():
            dist.broadcast_object_list(box, src=owner)
        shared: Value = box[0]
        return shared

    def barrier(self, *, patient: bool = False) -> None:
        """Wait until all ranks are here; ``patient`` where one of them may have been measuring a model for hours."""
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
