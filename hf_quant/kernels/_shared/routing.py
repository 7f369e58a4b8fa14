"""Sorts rows by expert on the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the choices of experts, in a reproducible order.

    Args:
        chosen: int64 ``[M, top_k]``, the experts of each row; numbers from E on belong to other devices and come last.
        experts: Number of experts, E.

    Returns:
        int64 ``[E]``, the end of each expert's rows; and int64 ``[M * top_k]``, the choices in sorted order, where ``top_k * row +
            i`` is the i-th choice of ``row``.
    """
    numbers, order = chosen.flatten().sort(stable=True)
    return torch.searchsorted(numbers, torch.arange(experts, device=chosen.device), right=True), order


def back_in_order(rows: Tensor, order: Tensor) -> Tensor:
    """Undo the order of `by_expert`."""
    return torch.zeros_like(rows).index_copy(0, order, rows)


def cut(ends: Tensor, rows: int, size: int) -> Tensor:
    """Tiles of up to ``size`` rows of one expert, the largest possible number of them: int32 ``[T, 3]``, expert or -1, first row, end."""
    experts, counts = ends.numel(), ends.diff(prepend=ends.new_zeros(1))
    tiles = -(-counts // size)
    until, at = tiles.cumsum(0), torch.arange(rows // size + min(experts, rows), device=ends.device)
    expert = torch.searchsorted(until, at, right=True)
    of_expert = expert.clamp(max=experts - 1)
    first = (ends - counts)[of_expert] + (at - (until - tiles)[of_expert]) * size
    return torch.stack([torch.where(expert < experts, expert, -1), first, ends[of_expert]], 1).int()


def spans(ends: Tensor, *stacks: Tensor | None) -> Iterator[tuple[int, int, list[Any]]]:
    """``(i, j, parts)`` for every expert with rows: their range, and its parts of the stacks. Waits for the device."""
    i = 0
    for expert, j in enumerate(ends.tolist()):
        if j > i:
            yield i, j, [None if stack is None else stack[expert] for stack in stacks]
        i = j
