"""What is measured for every token: one file a metric, each with a ``METRIC``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_quant import _plugins


@dataclass(frozen=True)
class BaseTokens:
    """The next-token distributions of the base at P positions, compressed (V: size of the vocabulary).

    The k most likely tokens are exact. Of the rest (the tail), m tokens are drawn in proportion to their probability by
    systematic sampling (a random offset, then even steps through the cumulative probability of the tail, in the order of the
    token ids), so that sums over the tail are estimated without bias. For a small vocabulary k = V and m = 0.

    Attributes:
        top_ids: int64 ``[P, k]``, most likely first.
        top: float64 ``[P, k]``, their log-probabilities; -inf for masked tokens.
        tail_ids: int64 ``[P, m]``.
        tail: float64 ``[P, m]``, their log-probabilities.
        tail_mass: float64 ``[P]``, logarithm of the total probability of the tail; -inf without a tail.
        target: float64 ``[P]``, log-probability of the next token of the text.
        stop_ids: int64 ``[P, s]``, the tokens that end an answer, the same at every position; s = 0 where the text has none.
        stop: float64 ``[P, s]``, their log-probabilities, exact.
        end_of_thought_ids: int64 ``[P, e]``, the tokens that end a thought, likewise.
        end_of_thought: float64 ``[P, e]``, their log-probabilities, exact.
    """

    top_ids: Tensor
    top: Tensor
    tail_ids: Tensor
    tail: Tensor
    tail_mass: Tensor
    target: Tensor
    stop_ids: Tensor
    stop: Tensor
    end_of_thought_ids: Tensor
    end_of_thought: Tensor


@dataclass(frozen=True)
class Metric:
    """How to measure one property.

    Attributes:
        title: For tables.
        measure: From the base's distributions, the model's log-probabilities ``[P, V]`` (float64) and the next tokens ``[P]`` to a
            value per position, ``[P]``; or to a pair: estimated values and their variances.
        ideal: The value of a model that equals its base; None where that depends on the text.
        finish: Applied to the mean over positions (the exponential, for perplexity).
        quantiles: Quantiles to report of the values of single tokens, 0 to 1.
        most: The largest possible value; the interval is then computed for its difference from that. None if it is unbounded.
        least: The smallest possible value. Where both are known, an interval is kept inside of them (`measure.estimate`).
        where: From the base's distributions, the next tokens and whether each of them belongs to the document of the token before
            it, to the positions that count, bool ``[P]``; None: all count. A metric without such a position is not reported.
    """

    title: str
    measure: Callable[[BaseTokens, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
    ideal: float | None = None
    finish: Callable[[float], float] = float
    quantiles: tuple[float, ...] = ()
    most: float | None = None
    least: float | None = None
    where: Callable[[BaseTokens, Tensor, Tensor], Tensor] | None = None


def exponential(mean: float) -> float:
    """``e`` to the power of ``mean``, at most 1e304, since JSON has no infinity."""
    return math.exp(min(mean, 700.0))


def all_metrics() -> dict[str, Metric]:
    """All metrics, by file name."""
    return {name: _plugins.load("evaluation.metrics", name).METRIC for name in _plugins.names("evaluation.metrics")}
