"""Perplexity: the exponential of the mean negative log-likelihood of the next token."""

from __future__ import annotations

from torch import Tensor


def negative_log_likelihood(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """Of each next token, nats: ``[B, T - 1]`` from log-probabilities ``[B, T - 1, V]`` and ids ``[B, T]``."""
    return -log_probabilities.gather(-1, ids[:, 1:, None]).squeeze(-1)
