"""Measures a model that predicts next tokens against its base, on the same held-out text.

The outputs of the base are computed once and stored on disk (`reference`), so the two models are never in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import HfQuantError
from hf_quant.evaluation.bootstrap import interval, sums
from hf_quant.evaluation.metrics import all_metrics
from hf_quant.evaluation.reference import Part, Progress, Reference, log_probabilities, require_predictions
from hf_quant.evaluation.results import FEWEST_DOCUMENTS, Estimate, Quality


@torch.inference_mode()
def evaluate(model: Any, reference: Reference, progress: Progress = iter) -> Quality:
    """Measure ``model`` against a base.

    Args:
        model: A causal language model, or an encoder with its decoder.
        reference: The stored outputs of the base on a text.
        progress: Wraps the list of batches, for a progress bar.

    Raises:
        HfQuantError: The vocabularies differ, the model does not predict next tokens, or logits are not finite.
    """
    values, variances = token_values(model, reference, progress)
    windows, noise = reference.windows, reference.meta["noise"]
    document = windows.document[:, 1:][windows.scored]
    metrics = {
        name: estimate(
            values[name], document, noise=noise.get(name), ideal=metric.ideal, most=metric.most, finish=metric.finish
        )
        for name, metric in all_metrics().items()
    }
    quantiles = {
        f"{name}_p{100 * q:g}": values[name].quantile(q).item()
        for name, metric in all_metrics().items()
        for q in metric.quantiles
    }
    tokens = int(windows.scored.sum())
    return Quality(
        kind="seq2seq" if getattr(model.config, "is_encoder_decoder", False) else "causal", tokens=tokens, documents=len(document.unique()), resampled=resampled(document),
        context=windows.ids.shape[1], stride=windows.stride, text_sha256=windows.sha256, dtype=str(model.dtype).removeprefix("torch."),
        base_dtype=reference.meta["base_dtype"], metrics=metrics, quantiles=quantiles,
        kl_error=3 * math.sqrt(variances["kl"].sum().item()) / tokens,
    )  # fmt: skip


def means(model: Any, reference: Reference, progress: Progress = iter) -> dict[str, float]:
    """The mean of every metric, without intervals."""
    values, _ = token_values(model, reference, progress)
    return {name: metric.finish(values[name].mean().item()) for name, metric in all_metrics().items()}


def estimate(
    values: Tensor, document: Tensor, *,
    noise: float | None, ideal: float | None, most: float | None = None, finish: Callable[[float], float] = float,
) -> Estimate:  # fmt: skip
    """The mean of ``values``, with an interval if they come from enough documents.

    Args:
        values: ``[P]``.
        document: ``[P]``, the number of the document that each value comes from.
        noise: The same metric for the base in bf16; None if it was not measured.
        ideal: As in `metrics.Metric`.
        most: As in `metrics.Metric`.
        finish: As in `metrics.Metric`.
    """
    total, count = sums(values, document)
    value = finish((total.sum() / count.sum()).item())
    if most is None:
        ends = interval(total, count)
    elif (ends := interval(most * count - total, count)) is not None:
        ends = most - ends[1], most - ends[0]
    if ends is None:
        return Estimate(value, None, None, noise)
    low, high = map(finish, ends)
    if noise is None or ideal is None:
        return Estimate(value, low, high, noise)
    distance = 0.0 if low <= ideal <= high else min(abs(low - ideal), abs(high - ideal))
    return Estimate(value, low, high, noise, distance <= abs(noise - ideal))


def resampled(document: Tensor) -> str | None:
    """`Quality.resampled`: the units that the intervals are computed over."""
    return "documents" if len(document.unique()) >= FEWEST_DOCUMENTS else None


@torch.inference_mode()
def token_values(
    model: Any, reference: Reference, progress: Progress = iter
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each metric at each position, float64 ``[P]``; and the variance of those that are estimates, float64 ``[P]``.

    Raises:
        HfQuantError: As for `evaluate`.
    """
    require_predictions(model)
    values: dict[str, list[Tensor]] = {}
    variances: dict[str, list[Tensor]] = {}
    batch = reference.meta["batch"]
    for i, part in enumerate(progress(reference)):
        log_q = log_probabilities(model, part.ids, part.scored, i * batch)
        if log_q.shape[-1] != reference.meta["vocabulary"]:
            raise HfQuantError(
                f"vocabularies differ: {log_q.shape[-1]} tokens, the base has {reference.meta['vocabulary']}"
            )
        for name, metric in all_metrics().items():
            measured = metric.measure(part.base, log_q, part.target)
            value, *variance = measured if isinstance(measured, tuple) else (measured,)
            _require_finite(value, metric.title, part, i * batch)
            values.setdefault(name, []).append(value.double())
            if variance:
                variances.setdefault(name, []).append(variance[0].double())
    return {n: torch.cat(chunks) for n, chunks in values.items()}, {
        n: torch.cat(chunks) for n, chunks in variances.items()
    }


def _require_finite(value: Tensor, title: str, part: Part, first: int) -> None:
    bad = (~value.isfinite()).nonzero()
    if len(bad):
        window = first + int(part.scored.nonzero()[int(bad[0])][0])
        raise HfQuantError(
            f"{title} is not finite in window {window}: the model rules out a token that its base holds possible"
        )
