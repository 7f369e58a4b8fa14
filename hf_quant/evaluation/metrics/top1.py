"""Top-1 agreement: how often model and base find the same token likeliest."""

from __future__ import annotations

from torch import Tensor

from hf_quant.evaluation.metrics import BaseTokens, Metric


def same_choice(base: BaseTokens, log_q: Tensor, target: Tensor) -> Tensor:
    """1 where they agree, else 0."""
    return log_q.argmax(-1).eq(base.top_ids[:, 0]).double()


METRIC = Metric("top-1 agreement", same_choice, ideal=1, most=1)
