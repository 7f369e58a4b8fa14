"""Perplexity of the base on the same tokens."""

from __future__ import annotations

from torch import Tensor

from hf_quant.evaluation.metrics import BaseTokens, Metric, exponential


def negative_log_likelihood(base: BaseTokens, log_q: Tensor, target: Tensor) -> Tensor:
    """For each position, in nats."""
    return -base.target


METRIC = Metric("perplexity of the base", negative_log_likelihood, finish=exponential)
