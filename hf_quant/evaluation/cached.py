"""Measures a model as it generates: the text is read in chunks, through a cache of quantized keys and values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.hf._compat import cache_argument
from hf_quant.hf.kv_cache import GROUP, cache_bytes


class Cached(nn.Module):
    """Wraps a causal language model, so that every measurement of it uses the cache.

    Args:
        model: Quantized or not.
        kind: ``"int8"`` or ``"int4"`` for a quantized cache; None for one in floating point.
    """

    def __init__(self, model: Any, kind: str | None) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        self.nbytes = 0  # size of the last cache when full

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.model.config

    def can_generate(self) -> bool:
        """Whether the model can generate."""
        return bool(self.model.can_generate())

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        cache = cache_argument(self.model, self.kind)
        parts = [self.model(part, use_cache=True, **cache).logits for part in input_ids.split(GROUP, 1)]
        self.nbytes = cache_bytes(next(iter(cache.values())))
        return SimpleNamespace(logits=torch.cat(parts, 1))
