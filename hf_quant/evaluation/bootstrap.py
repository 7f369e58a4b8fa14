"""Bootstrap intervals of means over tokens, where tokens of one document are not independent.

Whole documents are drawn with replacement (Efron, "Bootstrap Methods", 1979; percentile interval). Every metric is measured
on the same tokens for model and base, so ratios and differences come out paired.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 2000
FEWEST = 10  # documents; with fewer, windows are drawn


def sums(values: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of ``values`` ``[P]`` and count, of each unit: float64 ``[U]`` twice; ``unit`` ``[P]`` numbers them."""
    names, at = unit.unique(return_inverse=True)
    total = torch.zeros(len(names), dtype=torch.float64).index_add_(0, at, values.double())
    return total, torch.bincount(at, minlength=len(names)).double()


def interval(total: Tensor, count: Tensor, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of ``sum(total) / sum(count)`` when units are drawn with replacement.

    Args:
        total: ``[U]``, sum of each unit.
        count: ``[U]``, values in each.
        level: How often it shall cover.
        seed: The same intervals come out every time.
    """
    units = len(total)
    drawn = torch.randint(units, (RESAMPLES, units), generator=torch.Generator().manual_seed(seed))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    edge = (1 - level) / 2
    low, high = means.quantile(torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return low, high
