"""The quality gate: the largest loss of quality that a model may have, and by how much a model exceeds it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hf_quant.errors import HfQuantError
from hf_quant.evaluation.results import Estimate, Quality


def unfavourable(measured: Estimate, sign: int, margin: float = 1.0) -> float:
    """The value that a gate judges: the worse end of the confidence interval, or the mean where there is no interval.

    Args:
        measured: A value and its interval.
        sign: 1 where larger is worse, -1 where smaller is worse.
        margin: Multiplies the distance from the mean to that end.
    """
    end = measured.high if sign > 0 else measured.low
    return measured.value if end is None else measured.value + margin * (end - measured.value)


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether a model kept its budget, as results.json holds it.

    Attributes:
        budget: Name of a limit of `Budget` to its value; only those that are set.
        passed: Whether all of them were kept.
        misses: A sentence for each that was not.
    """

    budget: dict[str, float]
    passed: bool
    misses: list[str]


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of quality loss; None means no limit.

    Attributes:
        max_kl: Mean KL divergence to the base, nats per token.
        max_ppl_increase: Perplexity over the base's, minus one: 0.01 is one percent.
        min_top1: Share of predictions whose likeliest token is the base's.
        min_cosine: Mean cosine similarity of an encoder's embeddings to the base's.
    """

    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_top1: float | None = None
    min_cosine: float | None = None

    def __bool__(self) -> bool:
        return self != Budget()

    def misses(self, quality: Quality, margin: float = 1.0) -> list[str]:
        """A sentence for every metric that exceeds its limit; NaN exceeds it, and so does a model that was not measured.

        The worse end of the 95 % interval is judged, so that a model passes because it is good and not because the text was
        easy; the mean is judged where the text has too few documents for an interval.

        Args:
            quality: What was measured.
            margin: Multiplies the distance from the mean to the judged end.

        Raises:
            HfQuantError: A limited metric was not measured, as KL divergence for an encoder.
        """
        if self and quality.tokens < 1:
            return ["nothing was measured: 0 tokens"]
        self.refuse_unmeasured(quality.metrics, f"{quality.kind} models")
        sentences = []
        for name, title, limit, offset, sign in self._limits():
            measured = quality.metrics[name]
            judged = unfavourable(measured, sign, margin) - offset
            if not sign * judged <= sign * limit:
                side = "over" if sign > 0 else "under"
                sentence = f"{title} {measured.value - offset:.5g}"
                if judged != measured.value - offset:
                    times = "" if margin == 1 else f"{margin:g} times the "
                    sentence += f" ({times}95 % interval {'up' if sign > 0 else 'down'} to {judged:.5g})"
                sentences.append(f"{sentence} is {side} the {limit:g} allowed, by {abs(judged - limit):.3g}")
        return sentences

    def refuse_unmeasured(self, measured: Collection[str], of: str) -> None:
        """Refuse limits of metrics that are not among those ``measured``; ``of`` says of what."""
        for name, title, *_ in self._limits():
            if name not in measured:
                instead = "; --min-cosine 99% limits what is" if "embedding_cosine" in measured else ""
                raise HfQuantError(f"the gate asks for {title}, which is not measured for {of}{instead}")

    def _limits(self) -> Iterator[tuple[str, str, float, float, int]]:
        """Metric, its title, its limit, what is taken off it, and 1 where larger is worse, for every limit that is set."""
        for name, title, limit, offset, sign in (
            ("kl", "KL", self.max_kl, 0.0, 1),
            ("perplexity_ratio", "the increase of perplexity", self.max_ppl_increase, 1.0, 1),
            ("top1", "top-1 agreement", self.min_top1, 0.0, -1),
            ("embedding_cosine", "cosine similarity of embeddings", self.min_cosine, 0.0, -1),
        ):
            if limit is not None:
                yield name, title, limit, offset, sign

    def verdict(self, quality: Quality) -> dict[str, Any]:
        """For results.json: the limits, whether the model passed, and a sentence for each metric that did not."""
        misses = self.misses(quality)
        budget = {name: limit for name, limit in asdict(self).items() if limit is not None}
        return {"budget": budget, "passed": not misses, "misses": misses}
