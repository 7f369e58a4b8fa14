"""Confidence intervals of means over tokens, where the tokens of one document are not independent of each other.

Whole documents are the units: the mean over tokens is a ratio of two sums over documents, and its standard error that of a
ratio. Such a mean is divided by its standard error, and how that quotient scatters is found by simulation, the bootstrap-t
(Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 12). Some documents are many times harder than
others, and a few dozen of them hold too little of that long tail to be drawn from: where all their means are positive,
documents are therefore drawn from the log-normal distribution that fits them, and the quotient is that of the logarithm
(Angus, "Bootstrap One-Sided Confidence Intervals for the Log-Normal Mean", 1994); otherwise they are drawn from themselves.
`benchmarks/bootstrap_coverage.py` simulates how often these intervals hold a truth that is known. Every metric is measured
on the same tokens for model and base, so ratios and differences are paired.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_quant.evaluation.results import FEWEST_DOCUMENTS

RESAMPLES = 2000
AT_ONCE = 1 << 22  # values drawn at once: 32 MB


def sums(values: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of ``values`` ``[P]`` and count, of each unit: float64 ``[U]`` twice; ``unit`` ``[P]`` numbers them."""
    names, at = unit.unique(return_inverse=True)
    total = torch.zeros(len(names), dtype=torch.float64).index_add_(0, at, values.double())
    return total, torch.bincount(at, minlength=len(names)).double()


def interval(total: Tensor, count: Tensor, *, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Interval of the ratio ``E[total] / E[count]``, estimated by ``total.sum() / count.sum()``.

    Args:
        total: float64 ``[U]``, sum of each unit.
        count: float64 ``[U]``, values in each.
        level: How often it shall cover.
        seed: The same intervals come out every time.

    Returns:
        Both ends; None where units are fewer than `results.FEWEST_DOCUMENTS`, or do not differ enough to tell.
    """
    ratio, error = _ratio(total, count)
    if len(total) < FEWEST_DOCUMENTS or not error > 0:
        return None
    draw = torch.Generator().manual_seed(seed)
    step = max(1, AT_ONCE // len(total))
    sizes = [min(step, RESAMPLES - at) for at in range(0, RESAMPLES, step)]
    edges = torch.tensor([(1 + level) / 2, (1 - level) / 2], dtype=torch.float64)
    if (total > 0).all():
        pivots = torch.cat([_pivots_of_log_normal(total, count, size, draw) for size in sizes])
        low, high = (ratio * torch.exp(-error / ratio * pivots.quantile(edges))).tolist()
    else:
        pivots = torch.cat([_pivots_of_resamples(total, count, size, draw) for size in sizes])
        low, high = (ratio - error * pivots.quantile(edges)).tolist()
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _ratio(total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Of samples ``[..., U]``: the ratio of their sums, and its standard error by linearization."""
    units, whole = total.shape[-1], count.sum(-1)
    ratio = total.sum(-1) / whole
    scatter = (total - ratio[..., None] * count).square().sum(-1) * units / (units - 1)
    return ratio, scatter.sqrt() / whole


def _pivots_of_log_normal(total: Tensor, count: Tensor, draws: int, draw: torch.Generator) -> Tensor:
    """Errors of the logarithm over their standard errors, ``[draws]``: units as long as ``count`` says."""
    spread = (total / count).log().std()
    means = (spread * torch.randn(draws, len(total), generator=draw, dtype=torch.float64)).exp()
    ratio, error = _ratio(means * count, count)
    return (ratio.log() - spread.square() / 2) * ratio / error


def _pivots_of_resamples(total: Tensor, count: Tensor, draws: int, draw: torch.Generator) -> Tensor:
    """Errors over their standard errors, ``[draws]``: units drawn with replacement."""
    drawn = torch.randint(len(total), (draws, len(total)), generator=draw)
    ratio, error = _ratio(total[drawn], count[drawn])
    return ((ratio - _ratio(total, count)[0]) / error).nan_to_num(0, torch.inf, -torch.inf)
