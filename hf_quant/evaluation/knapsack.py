"""Picks one option per group at the smallest size or the lowest cost: an exact multiple-choice knapsack.

Dynamic programming over the Pareto frontier (Nemhauser and Ullmann, 1969): after each group, only the partial plans remain
that no other plan beats in both size and cost. Sizes are whole bytes and repeat from block to block, so few plans remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frontier:
    """Every plan that no other plan beats in both size and cost, smallest first.

    Attributes:
        size: int64 ``[F]``, ascending.
        cost: float64 ``[F]``, descending.
        steps: For each group and each plan on the frontier then: the partial plan that it extends, and its choice.
    """

    size: Tensor
    cost: Tensor
    steps: list[tuple[Tensor, Tensor]]

    def smallest(self, budget: float) -> list[int] | None:
        """The choice per group of the smallest plan that costs at most ``budget``; None if there is none."""
        good = (self.cost <= budget).nonzero()
        return self._picks(int(good[0])) if len(good) else None

    def cheapest(self, limit: int) -> list[int] | None:
        """The choice per group of the cheapest plan that is at most ``limit`` large; None if there is none."""
        good = (self.size <= limit).nonzero()
        return self._picks(int(good[-1])) if len(good) else None

    def _picks(self, at: int) -> list[int]:
        picks = []
        for parent, pick in reversed(self.steps):
            picks.append(int(pick[at]))
            at = int(parent[at])
        return picks[::-1]


def frontier(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]]) -> Frontier:
    """The Pareto frontier of all plans.

    Args:
        sizes: Bytes of each choice of each group.
        costs: Cost of each choice of each group, not negative.
    """
    size, cost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps = []
    for own_sizes, own_costs in zip(sizes, costs, strict=True):
        choices = len(own_sizes)
        all_sizes = (size[:, None] + torch.tensor(own_sizes)).flatten()
        all_costs = (cost[:, None] + torch.tensor(own_costs, dtype=torch.float64)).flatten()
        order = all_costs.argsort(stable=True)
        order = order[all_sizes[order].argsort(stable=True)]  # by size, then by cost
        best = all_costs[order].cummin(0).values
        efficient = order[torch.cat([torch.tensor([True]), best[1:] < best[:-1]])]
        size, cost = all_sizes[efficient], all_costs[efficient]
        steps.append((efficient // choices, efficient % choices))
    return Frontier(size, cost, steps)
