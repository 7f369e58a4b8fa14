"""A model measured as it generates: text goes in piece by piece, through a cache of quantized keys and values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.hf._compat import cache_argument
from hf_quant.hf.kv_cache import GROUP, cache_bytes


class Cached(nn.Module):
    """Stands in for a causal language model wherever one is measured.

    Args:
        model: In any form.
        kind: Of its cache: ``"int8"`` or ``"int4"``; None for one in floating point.
    """

    def __init__(self, model: Any, kind: str | None) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        self.nbytes = 0  # of the last cache, full

    @property
    def device(self) -> torch.device:
        """The model's."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        made: torch.dtype = self.model.dtype
        return made

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def can_generate(self) -> bool:
        """Whether the model does."""
        return bool(self.model.can_generate())

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        kept = cache_argument(self.model, self.kind)
        parts = [self.model(part, use_cache=True, **kept).logits for part in input_ids.split(GROUP, 1)]
        self.nbytes = cache_bytes(next(iter(kept.values())))
        return SimpleNamespace(logits=torch.cat(parts, 1))
