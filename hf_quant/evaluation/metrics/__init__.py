"""What is measured of every token: one file each, whose ``METRIC`` says how."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_quant import _plugins


@dataclass(frozen=True)
class BaseTokens:
    """The base's next-token distributions at P positions, compactly (V: vocabulary).

    The k likeliest tokens are kept exactly. Of the rest (the tail), m tokens are drawn in proportion to their probability by
    systematic sampling (one random offset, then even steps through the tail's cumulative probability, in the order of the
    token ids): sums over the tail are then estimated without bias. Where the vocabulary is small, k = V and m = 0.

    Attributes:
        top_ids: int64 ``[P, k]``, likeliest first.
        top: float64 ``[P, k]``, their log-probabilities; -inf for tokens that the base rules out.
        tail_ids: int64 ``[P, m]``.
        tail: float64 ``[P, m]``, their log-probabilities.
        tail_mass: float64 ``[P]``, logarithm of the total probability of the tail; -inf where there is none.
        target: float64 ``[P]``, log-probability of the token that came.
    """

    top_ids: Tensor
    top: Tensor
    tail_ids: Tensor
    tail: Tensor
    tail_mass: Tensor
    target: Tensor


@dataclass(frozen=True)
class Metric:
    """How to measure one thing.

    Attributes:
        title: For a table.
        measure: From the base's tokens, the model's log-probabilities ``[P, V]`` (float64) and the tokens that came ``[P]``
            to one value for each position, ``[P]``; or to two: values that are estimates, and the variance of each.
        ideal: What a model that equals its base has; None where that depends on the text.
        finish: What the mean over positions becomes (the exponential, for perplexity).
        quantiles: Those of the single values worth reporting, 0 to 1.
        most: The largest value there can be: its interval is that of what is missing to it. None where there is none.
    """

    title: str
    measure: Callable[[BaseTokens, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
    ideal: float | None = None
    finish: Callable[[float], float] = float
    quantiles: tuple[float, ...] = ()
    most: float | None = None


def exponential(mean: float) -> float:
    """``e`` to the power of ``mean``; 1e304 stands for whatever is larger than that, since JSON knows no infinity."""
    return math.exp(min(mean, 700.0))


def all_metrics() -> dict[str, Metric]:
    """Every metric there is, by file name."""
    return {name: _plugins.load("evaluation.metrics", name).METRIC for name in _plugins.names("evaluation.metrics")}
