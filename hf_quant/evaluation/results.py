"""What was measured, as plain records: a card needs no torch to read them. `results.schema.json` documents the JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FEWEST_DOCUMENTS = 20  # for an interval: with fewer it holds the truth less often than it says (benchmarks/results)


@dataclass(frozen=True, slots=True)
class Estimate:
    """One number with its uncertainty.

    Attributes:
        value: Over all tokens measured.
        low: Lower end of the 95 % confidence interval; None where there are too few documents for one.
        high: Upper end, likewise.
        noise: The same number for the base itself, run in bf16 instead of float32; None if it was not measured.
        within_noise: Whether the interval reaches what the base's own rounding costs; None without ``noise`` or interval.
    """

    value: float
    low: float | None
    high: float | None
    noise: float | None = None
    within_noise: bool | None = None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]")


@dataclass(frozen=True, slots=True)
class Quality:
    """A model beside its base, on the same text.

    Attributes:
        kind: ``"causal"`` (next-token distributions) or ``"encoder"`` (embeddings).
        tokens: Predictions measured; for encoders, tokens read.
        documents: Documents of the text they come from.
        resampled: ``"documents"``, the units of the intervals; None where they are too few for intervals. Records of older
            versions also have ``"windows"``, whose intervals were too narrow.
        context: Tokens in a window.
        stride: Tokens from one window to the next; the overlap is read and not scored.
        text_sha256: Of the token ids.
        dtype: What the model computed in.
        base_dtype: What the base computed in.
        metrics: Name of a file in ``evaluation/metrics`` to its estimate.
        quantiles: For example ``kl_p99``, of the values of single tokens.
        kl_error: Three standard errors of ``metrics["kl"].value`` from sampling the tail of the base's distributions.
    """

    kind: str
    tokens: int
    documents: int
    resampled: str | None
    context: int
    stride: int
    text_sha256: str
    dtype: str
    base_dtype: str
    metrics: dict[str, Estimate]
    quantiles: dict[str, float] = field(default_factory=dict)
    kl_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Quality:
        """Inverse of `to_dict`."""
        return cls(**(record | {"metrics": {name: Estimate(**e) for name, e in record["metrics"].items()}}))


def interval_shown(estimate: Mapping[str, Any], show: Callable[[float], str], between: str = " to ") -> str:
    """Both ends of an estimate's interval, each as ``show`` writes it; ``-`` where it has none.

    Args:
        estimate: As `Quality.to_dict` stores it.
        show: Writes a number.
        between: What stands between the ends.
    """
    return "-" if estimate["low"] is None else f"{show(estimate['low'])}{between}{show(estimate['high'])}"


def why_no_interval(quality: Mapping[str, Any]) -> str | None:
    """A sentence on why ``quality`` (as `Quality.to_dict` stores it) has no intervals, or None if it has."""
    documents = quality["documents"]
    if quality["resampled"] is not None:
        return None
    return (
        f"no interval: the text has {documents} document{'s' if documents != 1 else ''} (separated by <|endoftext|>), and "
        f"at least {FEWEST_DOCUMENTS} are needed"
    )
