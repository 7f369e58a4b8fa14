"""One choice for each group, at the least size or the least cost: an exact multiple-choice knapsack.

Dynamic programming over the Pareto frontier (Nemhauser and Ullmann, 1969): after each group only those partial plans are
kept that no other one beats in both size and cost. Sizes are whole bytes and repeat from block to block, so few are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frontier:
    """Every plan that is not beaten in both respects, smallest first.

    Attributes:
        size: int64 ``[F]``, rising.
        cost: float64 ``[F]``, falling.
        steps: For each group, which partial plan and which choice each plan on the frontier then came from.
    """

    size: Tensor
    cost: Tensor
    steps: list[tuple[Tensor, Tensor]]

    def smallest(self, budget: float) -> list[int] | None:
        """The choice for each group that is smallest with a cost of at most ``budget``; None if there is none."""
        good = (self.cost <= budget).nonzero()
        return self._picks(int(good[0])) if len(good) else None

    def cheapest(self, limit: int) -> list[int] | None:
        """The choice for each group that costs least with a size of at most ``limit``; None if there is none."""
        good = (self.size <= limit).nonzero()
        return self._picks(int(good[-1])) if len(good) else None

    def _picks(self, at: int) -> list[int]:
        made = []
        for parent, pick in reversed(self.steps):
            made.append(int(pick[at]))
            at = int(parent[at])
        return made[::-1]


def frontier(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]]) -> Frontier:
    """All plans worth considering.

    Args:
        sizes: Of each choice of each group, bytes.
        costs: Likewise, not negative.
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
        kept = order[torch.cat([torch.tensor([True]), best[1:] < best[:-1]])]
        size, cost = all_sizes[kept], all_costs[kept]
        steps.append((kept // choices, kept % choices))
    return Frontier(size, cost, steps)
