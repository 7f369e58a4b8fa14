"""Which rows go to which expert: sorted on the device, which nobody waits for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Rows of one expert after those of another; the same order every time.

    Args:
        chosen: int64 ``[M, top_k]``, the experts of each row; those from E on are not here and come last.
        experts: E.

    Returns:
        int64 ``[E]``, where the rows of each expert end; and int64 ``[M * top_k]``: which choice each row is of, where
        ``top_k * row + i`` is the i-th of ``row``.
    """
    numbers, order = chosen.flatten().sort(stable=True)
    return torch.searchsorted(numbers, torch.arange(experts, device=chosen.device), right=True), order


def back_in_order(rows: Tensor, order: Tensor) -> Tensor:
    """Rows that `by_expert` sorted, as they were."""
    return torch.zeros_like(rows).index_copy(0, order, rows)


def cut(ends: Tensor, rows: int, size: int) -> Tensor:
    """Tiles of up to ``size`` rows of one expert, as many as there can be: int32 ``[T, 3]``, expert or -1, first row, end."""
    experts, counts = ends.numel(), ends.diff(prepend=ends.new_zeros(1))
    tiles = -(-counts // size)
    until, at = tiles.cumsum(0), torch.arange(rows // size + min(experts, rows), device=ends.device)
    expert = torch.searchsorted(until, at, right=True)
    of_expert = expert.clamp(max=experts - 1)
    first = (ends - counts)[of_expert] + (at - (until - tiles)[of_expert]) * size
    return torch.stack([torch.where(expert < experts, expert, -1), first, ends[of_expert]], 1).int()


def spans(ends: Tensor, *stacks: Tensor | None) -> Iterator[tuple[int, int, list[Any]]]:
    """``(i, j, parts)``: the rows of every expert that has some, and what is its own in the stacks; waits for the device."""
    i = 0
    for expert, j in enumerate(ends.tolist()):
        if j > i:
            yield i, j, [None if stack is None else stack[expert] for stack in stacks]
        i = j
