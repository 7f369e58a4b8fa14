"""KL divergence of the model's next-token distribution from the base's: ``sum_i p_i log(p_i / q_i)``."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_quant.evaluation.metrics import BaseTokens, Metric


def kl(base: BaseTokens, log_q: Tensor, target: Tensor) -> Tensor:
    """Of each position, nats; not negative.

    By the chain rule: the divergence between the likeliest tokens and one bucket for the tail, which is exact, plus the
    tail's mass times the divergence inside the tail, which is estimated (`tail`).
    """
    log_top = log_q.gather(-1, base.top_ids)
    made = _terms(base.top, log_top).sum(-1)
    if base.tail.shape[-1]:
        made += _terms(_log(base.tail_mass), _log(_rest(log_top))) + tail(base, log_q).mean(-1)
    return made


def tail(base: BaseTokens, log_q: Tensor) -> Tensor:
    """What each token drawn from the tail says that the divergence inside the tail adds: ``[P, m]``.

    Its mean is without bias, since the tokens were drawn by p; ``r - 1 - log r`` (r = q/p, both normalized over the tail)
    is never negative and varies by the square of ``log r``, where ``-log r`` alone varies by ``log r`` (the estimator k3
    of Schulman, http://joschu.net/blog/kl-approx.html).
    """
    mass = base.tail_mass[:, None]
    rest = _log(_rest(log_q.gather(-1, base.top_ids)))[:, None]
    log_r = log_q.gather(-1, base.tail_ids) - rest - base.tail + _log(mass)
    made = mass * (torch.expm1(log_r) - log_r).clamp(min=0)
    return made.where(mass > 0, 0)  # no tail within float32: what was drawn means nothing


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p log(p/q) - p + q``: adds up to the same as ``p log(p/q)``, and no term is negative."""
    p, log_ratio = log_p.exp(), log_p - log_q
    close = p * (torch.expm1(-log_ratio) + log_ratio).clamp(min=0)
    # which overflows where p is all but zero; this cancels where p and q are close
    return torch.where(log_ratio < -5, p * log_ratio - p + log_q.exp(), close)


def _rest(log_top: Tensor) -> Tensor:
    """The mass that the likeliest tokens leave."""
    return 1 - log_top.exp().sum(-1)


def _log(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny).log()


METRIC = Metric("KL (nats)", kl, ideal=0, quantiles=(0.5, 0.99))
