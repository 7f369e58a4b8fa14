"""Attention of one token on a CPU, which every step of ``generate`` computes: all queries of a head of keys in one product.

PyTorch's attention for CPUs takes the heads of queries one by one. With one token that is a product of a vector and a matrix,
and keys and values are read once for every query. In bfloat16 and float16 such products are so slow that they cost more than
all layers of a model of 4 bits from a few hundred tokens on.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_quant.nn import QuantMatrix
from hf_quant.training import FakeQuantMatrix

NAME = "sdpa"  # what transformers chooses where nobody says
ROWS = 2  # from which on products of 16-bit numbers are fast


def install() -> None:
    """Let `one_token` compute attention in layers that this package quantized, where it can; all else stays transformers' own.

    An implementation that somebody else has registered under that name stays as it is.
    """
    theirs: Any = ALL_ATTENTION_FUNCTIONS[NAME]
    if not theirs.__module__.startswith("transformers."):
        return

    @wraps(theirs)
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, **options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not dropout and _can(query, key, value, attention_mask, options) and _is_quantized(module):
            return one_token(query, key, value, attention_mask, scaling), None
        output: tuple[Tensor, Tensor | None] = theirs(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output

    attention.__module__ = __name__
    AttentionInterface.register(NAME, attention)


def one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention of one token to others.

    Args:
        query: ``[B, H, 1, D]``.
        key: ``[B, G, T, D]``; each of its heads has the next ``H / G`` heads of queries.
        value: ``[B, G, T, V]``.
        mask: Broadcasts to ``[B, H, 1, T]``: what may be looked at, or what is added to the scores. None: everything.
        scale: Of the scores; None: ``D ** -0.5``.

    Returns:
        ``[B, 1, H, V]``, contiguous, since models take views of it.
    """
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    rows = query.reshape(batch, groups, heads // groups, width)
    if heads == groups and query.element_size() == 2:
        rows = rows.expand(-1, -1, ROWS, -1)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], groups, heads // groups, mask.shape[-1])
    output = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return output[:, :, : heads // groups].reshape(batch, 1, heads, value.shape[-1]).contiguous()


def _can(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether it is one token on a CPU, and nothing is asked for that `one_token` does not know."""
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and not torch.compiler.is_exporting()
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and key.shape[1] == value.shape[1]
        and (mask is None or mask.ndim == 4)
        and not any(options.get(name) is not None for name in ("softcap", "position_bias"))
        and not options.get("output_attentions")
    )


def _is_quantized(module: nn.Module) -> bool:
    """Whether one of its layers is, with or without an adapter of PEFT around it."""
    layers = (getattr(child, "base_layer", child) for child in module.children())
    return any(isinstance(layer, (QuantMatrix, FakeQuantMatrix)) for layer in layers)
