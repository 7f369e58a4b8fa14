"""Measurements as plain records: a card reads them without torch. `results.schema.json` documents the JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FEWEST_DOCUMENTS = 20  # for an interval: with fewer documents its coverage is below 95 % (benchmarks/results)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its uncertainty.

    Attributes:
        value: Mean over all tokens.
        low: Lower end of the 95 % confidence interval; None where there are too few documents.
        high: Upper end of it; None where there are too few documents.
        noise: The same metric for the base in bf16 instead of float32; None if it was not measured.
        within_noise: Whether the interval includes what the base's rounding to bf16 costs; None without ``noise`` or interval.
        positions: Number of tokens that the mean is over; None for all that were scored.
    """

    value: float
    low: float | None
    high: float | None
    noise: float | None = None
    within_noise: bool | None = None
    positions: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]")


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of a model against its base on one text, or on samples of inputs.

    Attributes:
        kind: ``"causal"`` (next-token distributions), ``"seq2seq"`` (those of a decoder beside an encoder) or ``"encoder"``
            (embeddings).
        tokens: Number of predictions measured; for encoders, of tokens read, or of samples where no tokens are read.
        documents: Number of documents or samples that they come from.
        resampled: ``"documents"`` or ``"samples"``, the units of the intervals; None where there are too few for intervals. Older
            records also have ``"windows"``, whose intervals were too narrow.
        context: Tokens in a window; the most in a sample, and 0 where it has none.
        stride: Tokens from one window to the next; the overlap is read but not scored.
        text_sha256: SHA-256 of the token ids, or of the inputs.
        dtype: In which the model computed.
        base_dtype: In which the base computed.
        metrics: Name of a file in ``evaluation/metrics`` to its estimate.
        quantiles: Quantiles of the values of single tokens, such as ``kl_p99``.
        kl_error: Three standard errors of ``metrics["kl"].value``, from sampling the tail of the base's distributions.
        inputs: Names of the inputs of the samples, such as ``pixel_values``; empty for a text.
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
    inputs: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Quality:
        """Inverse of `to_dict`."""
        return cls(**(record | {"metrics": {name: Estimate(**e) for name, e in record["metrics"].items()}}))


def interval_shown(estimate: Mapping[str, Any], show: Callable[[float], str], between: str = " to ") -> str:
    """Both ends of an interval, formatted by ``show``; ``-`` where there is no interval.

    Args:
        estimate: As `Quality.to_dict` stores it.
        show: Formats a number.
        between: The text between the ends.
    """
    return "-" if estimate["low"] is None else f"{show(estimate['low'])}{between}{show(estimate['high'])}"


def why_no_interval(quality: Mapping[str, Any]) -> str | None:
    """Why ``quality`` (as `Quality.to_dict` stores it) has no intervals; None if it has some."""
    documents = quality["documents"]
    if quality["resampled"] is not None:
        return None
    if quality.get("inputs"):
        return f"no interval: there are {documents} samples, and at least {FEWEST_DOCUMENTS} are needed"
    lines = "; the lines of a single one" if quality["kind"] == "encoder" else ""
    return (
        f"no interval: the text has {documents} document{'s' if documents != 1 else ''} (separated by <|endoftext|>{lines}), "
        f"and at least {FEWEST_DOCUMENTS} are needed"
    )


def amount_of(quality: Mapping[str, Any]) -> str:
    """How much was measured, such as ``1,024 tokens``, or ``60 samples of pixel_values``."""
    tokens = f"{quality['tokens']:,} tokens"
    if not quality.get("inputs"):
        return tokens
    samples = f"{quality['documents']:,} samples of {' and '.join(quality['inputs'])}"
    return samples if quality["kind"] == "encoder" else f"{tokens} in {samples}"
