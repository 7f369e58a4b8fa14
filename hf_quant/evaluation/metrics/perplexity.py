"""Perplexity: the exponential of the mean negative log-likelihood of the token that came."""

from __future__ import annotations

from torch import Tensor

from hf_quant.evaluation.metrics import BaseTokens, Metric, exponential


def negative_log_likelihood(base: BaseTokens, log_q: Tensor, target: Tensor) -> Tensor:
    """Of each position, nats."""
    return -log_q.gather(-1, target[:, None]).squeeze(-1)


METRIC = Metric("perplexity", negative_log_likelihood, finish=exponential)
