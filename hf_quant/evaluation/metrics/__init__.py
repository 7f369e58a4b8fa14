"""What is measured of every token: one file each, whose ``METRIC`` says how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_quant import _plugins


@dataclass(frozen=True)
class BaseTokens:
    """The base's next-token distributions at P positions, compactly (V: vocabulary).

    The k likeliest tokens are kept exactly. Of the rest (the tail), m tokens are drawn with replacement in proportion to
    their probability: sums over the tail are then estimated without bias. Where the vocabulary is small, k = V and m = 0.

    Attributes:
        top_ids: int64 ``[P, k]``, likeliest first.
        top: float32 ``[P, k]``, their log-probabilities.
        tail_ids: int64 ``[P, m]``.
        tail: float32 ``[P, m]``, their log-probabilities.
        tail_mass: float32 ``[P]``, total probability of the tail.
        target: float32 ``[P]``, log-probability of the token that came.
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
        measure: From the base's tokens, the model's log-probabilities ``[P, V]`` and the tokens that came ``[P]`` to one
            value for each position, ``[P]``.
        ideal: What a model that equals its base has; None where that depends on the text.
        finish: What the mean over positions becomes (the exponential, for perplexity).
        quantiles: Those of the single values worth reporting, 0 to 1.
    """

    title: str
    measure: Callable[[BaseTokens, Tensor, Tensor], Tensor]
    ideal: float | None = None
    finish: Callable[[float], float] = float
    quantiles: tuple[float, ...] = ()


def all_metrics() -> dict[str, Metric]:
    """Every metric there is, by file name."""
    return {name: _plugins.load("evaluation.metrics", name).METRIC for name in _plugins.names("evaluation.metrics")}
