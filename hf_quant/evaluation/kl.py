"""KL divergence of the model's next-token distribution from the base's, and how often their first choice agrees."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(base: Tensor, model: Tensor) -> Tensor:
    """``KL(base || model)`` of each position, nats.

    Args:
        base: Log-probabilities ``[..., V]``.
        model: Likewise.

    Returns:
        ``[...]``; tiny negative values of rounding become 0.
    """
    return (base.exp() * (base - model)).sum(-1).clamp(min=0)


def same_choice(base: Tensor, model: Tensor) -> Tensor:
    """Whether the likeliest token is the same: bool ``[...]``."""
    return torch.eq(base.argmax(-1), model.argmax(-1))
