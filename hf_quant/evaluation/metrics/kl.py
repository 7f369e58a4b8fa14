"""KL divergence of the model's next-token distribution from the base's: ``sum_i p_i log(p_i / q_i)``.

All in log space and float64: a trained model is often so certain of one token that the probability of all others is far below
the spacing of floating-point numbers around 1, and a difference such as ``1 - sum`` would be only rounding error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_quant.evaluation.metrics import BaseTokens, Metric


def kl(base: BaseTokens, log_q: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """For each position, in nats, with the variance that comes from sampling the tail.

    The value is never negative, and infinite where the model masks a token that the base does not.

    By the chain rule: the divergence between the most likely tokens and a bucket for the tail, which is exact, plus the
    probability of the tail times the divergence within the tail, which is estimated (`inside_the_tail`).
    """
    value = _terms(base.top, log_q.gather(-1, base.top_ids)).sum(-1)
    if not base.tail.shape[-1]:
        return value, torch.zeros_like(value)
    rest = log_mass_without(log_q, base.top_ids)
    samples = inside_the_tail(base, log_q, rest)
    return value + _terms(base.tail_mass, rest) + samples.mean(-1), _variance_of_mean(samples)


def inside_the_tail(base: BaseTokens, log_q: Tensor, rest: Tensor) -> Tensor:
    """The estimate of the divergence within the tail from each sampled token: ``[P, m]``.

    It is unbiased, since the tokens were drawn from p. ``r - 1 - log r`` (r = q/p, both normalized over the tail) is never
    negative and varies with the square of ``log r``, where ``-log r`` alone varies with ``log r`` (the estimator k3 of Schulman,
    http://joschu.net/blog/kl-approx.html).

    Args:
        base: The base's distributions.
        log_q: The model's log-probabilities ``[P, V]``.
        rest: Logarithm of the probability that the model gives the tail, ``[P]``.
    """
    log_r = (log_q.gather(-1, base.tail_ids) - rest[:, None]) - (base.tail - base.tail_mass[:, None])
    value = base.tail_mass.exp()[:, None] * (torch.expm1(log_r) - log_r).clamp(min=0)
    return value.where(base.tail_mass[:, None] > -torch.inf, 0)  # without a tail, the samples have no meaning


def _variance_of_mean(samples: Tensor) -> Tensor:
    """For a systematic sample ``[P, m]``: ``[P]``.

    From successive differences, since neighbours in a systematic sample are not independent (Wolter, "An Investigation of
    Some Estimators of Variance for Systematic Sampling", 1984, its second estimator).
    """
    return samples.diff(dim=-1).square().mean(-1) / (2 * samples.shape[-1])


def log_mass_without(log_p: Tensor, ids: Tensor) -> Tensor:
    """Logarithm of the total probability of all tokens but ``ids`` ``[P, k]``, from log-probabilities ``[P, V]``: ``[P]``."""
    return log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p log(p/q) - p + q``: the sum is that of ``p log(p/q)``, and no term is negative."""
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
    close = p * (torch.expm1(-log_ratio) + log_ratio)  # does not cancel where p and q are close
    far = p * log_ratio - p + q  # does not overflow where they are not
    value = torch.where(log_ratio.abs() < 1, close, far).clamp(min=0)
    return torch.where(log_p == -torch.inf, q, value)  # where 0 log 0 is 0


METRIC = Metric("KL (nats)", kl, ideal=0, quantiles=(0.5, 0.99))
