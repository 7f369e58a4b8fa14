"""KL divergence of the model's next-token distribution from the base's: ``sum_i p_i log(p_i / q_i)``."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_quant.evaluation.metrics import BaseTokens, Metric


def kl(base: BaseTokens, log_q: Tensor, target: Tensor) -> Tensor:
    """Of each position, nats; not negative.

    Since both distributions sum to one, ``p log(p/q) - p + q``, which is never negative, sums to the same. Over the tail
    it is ``p * (r - 1 - log r)``, r = q/p: its mean over tokens drawn by p, times the tail's mass. This varies by the
    square of ``log r`` where the plain integrand varies by ``log r`` (the estimator k3 of Schulman,
    http://joschu.net/blog/kl-approx.html).
    """
    log_q_top = log_q.gather(-1, base.top_ids)
    p, log_ratio = base.top.exp(), base.top - log_q_top
    # the right-hand form overflows where p is all but zero; the other one cancels where p and q are close
    made = torch.where(log_ratio < -5, p * log_ratio + log_q_top.exp() - p, p * _excess(log_ratio)).sum(-1)
    return made + tail(base, log_q).mean(-1) if base.tail.shape[-1] else made


def tail(base: BaseTokens, log_q: Tensor) -> Tensor:
    """What each sampled token of the tail says its whole contribution is: ``[P, m]``."""
    made = base.tail_mass[:, None] * _excess(base.tail - log_q.gather(-1, base.tail_ids))
    return made.where(base.tail_mass[:, None] > 0, 0)  # no tail within float32: what was drawn means nothing


def _excess(log_ratio: Tensor) -> Tensor:
    """``log(p/q) - 1 + q/p``."""
    return (torch.expm1(-log_ratio) + log_ratio).clamp(min=0)


METRIC = Metric("KL (nats)", kl, ideal=0, quantiles=(0.5, 0.99))
