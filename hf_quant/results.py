"""What was measured, as plain records: a card needs no torch to read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Quality:
    """A model beside its base, on the same tokens.

    Attributes:
        tokens: Predictions measured.
        documents: Documents of the text they come from.
        context: Tokens in a window.
        text_sha256: Of the token ids.
        perplexity: Of the model.
        base_perplexity: Of the base.
        kl_mean: KL divergence of the model from the base, nats per token.
        kl_median: Likewise, the median.
        kl_p99: Likewise, the 99th percentile.
        top1: Share of predictions whose likeliest token is the same, 0 to 1.
    """

    tokens: int
    documents: int
    context: int
    text_sha256: str
    perplexity: float
    base_perplexity: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
