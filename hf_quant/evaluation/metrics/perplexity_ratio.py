"""Perplexity over the base's; paired token by token, so that what makes a text hard cancels."""

from __future__ import annotations

from torch import Tensor

from hf_quant.evaluation.metrics import BaseTokens, Metric, exponential


def log_ratio(base: BaseTokens, log_q: Tensor, target: Tensor) -> Tensor:
    """How much less likely the model found the token that came, nats."""
    return base.target - log_q.gather(-1, target[:, None]).squeeze(-1)


METRIC = Metric("perplexity ratio", log_ratio, ideal=1, finish=exponential)
