"""Measures a model that predicts next tokens against its base, on the same held-out text or batches of inputs.

The outputs of the base are computed once and stored on disk (`reference`), so the two models are never in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import HfQuantError
from hf_quant.evaluation.bootstrap import interval, share_interval, sums
from hf_quant.evaluation.metrics import Metric, all_metrics
from hf_quant.evaluation.pieces import Piece
from hf_quant.evaluation.reference import Progress, Reference, log_probabilities, require_predictions
from hf_quant.evaluation.results import FEWEST_DOCUMENTS, Estimate, Quality
from hf_quant.evaluation.samples import Samples


@torch.inference_mode()
def evaluate(model: Any, reference: Reference, progress: Progress = iter) -> Quality:
    """Measure ``model`` against a base.

    Args:
        model: A causal language model, or an encoder with its decoder.
        reference: The stored outputs of the base.
        progress: Wraps the list of batches, for a progress bar.

    Raises:
        HfQuantError: The vocabularies differ, the model does not predict next tokens, or logits are not finite.
    """
    values, variances = token_values(model, reference, progress)
    windows, noise = reference.windows, reference.meta["noise"]
    document, inputs = windows.sources, windows.inputs if isinstance(windows, Samples) else ()
    metrics = {name: _estimated(all_metrics()[name], v, document, noise.get(name)) for name, v in values.items()}
    quantiles = {
        f"{name}_p{100 * q:g}": _quantile(value, q)
        for name, value in values.items()
        for q in all_metrics()[name].quantiles
    }
    tokens = len(document)
    return Quality(
        kind="seq2seq" if getattr(model.config, "is_encoder_decoder", False) else "causal", tokens=tokens, documents=len(document.unique()),
        resampled=resampled(document, "samples" if inputs else "documents"), context=windows.context, stride=windows.stride, inputs=list(inputs), text_sha256=windows.sha256, dtype=str(model.dtype).removeprefix("torch."),
        base_dtype=reference.meta["base_dtype"], metrics=metrics, quantiles=quantiles,
        kl_error=3 * math.sqrt(variances["kl"].sum().item()) / tokens,
    )  # fmt: skip


def _quantile(values: Tensor, q: float) -> float:
    """``values.nanquantile(q)``, which torch refuses for more than 2^24 values: interpolated linearly, without NaN."""
    counted = values[~values.isnan()].sort().values
    rank = q * (len(counted) - 1)
    below = int(rank)
    low, high = counted[below], counted[min(below + 1, len(counted) - 1)]
    return float(low.lerp(high, rank - below))


def _estimated(metric: Metric, values: Tensor, document: Tensor, noise: float | None) -> Estimate:
    """The estimate of one metric, from `token_values`."""
    count = ~values.isnan()
    mean = estimate(
        values[count], document[count], noise=noise, ideal=metric.ideal, most=metric.most, least=metric.least,
        finish=metric.finish,
    )  # fmt: skip
    return mean if metric.where is None else replace(mean, positions=len(values[count]))


def means(model: Any, reference: Reference, progress: Progress = iter) -> dict[str, float]:
    """The mean of every metric, without intervals."""
    values, _ = token_values(model, reference, progress)
    return {name: all_metrics()[name].finish(v.nanmean().item()) for name, v in values.items()}


def estimate(
    values: Tensor, document: Tensor, *,
    noise: float | None, ideal: float | None, most: float | None = None, least: float | None = None,
    finish: Callable[[float], float] = float,
) -> Estimate:  # fmt: skip
    """The mean of ``values``, with an interval if they come from enough documents.

    Args:
        values: ``[P]``.
        document: ``[P]``, the number of the document that each value comes from.
        noise: The same metric for the base in bf16; None if it was not measured.
        ideal: As in `metrics.Metric`.
        most: As in `metrics.Metric`.
        least: Likewise. Between the two no interval has to be wider than that of `bootstrap.share_interval`.
        finish: As in `metrics.Metric`.
    """
    total, count = sums(values, document)
    value = finish((total.sum() / count.sum()).item())
    if most is None:
        ends = interval(total, count)
    elif (ends := interval(most * count - total, count)) is not None:
        ends = most - ends[1], most - ends[0]
    if most is not None and least is not None:
        ends = _possible(ends, total / count, (total.sum() / count.sum()).item(), least, most)
    if ends is None:
        return Estimate(value, None, None, noise)
    low, high = map(finish, ends)
    if noise is None or ideal is None:
        return Estimate(value, low, high, noise)
    distance = 0.0 if low <= ideal <= high else min(abs(low - ideal), abs(high - ideal))
    return Estimate(value, low, high, noise, distance <= abs(noise - ideal))


def _possible(
    ends: tuple[float, float] | None, values: Tensor, mean: float, least: float, most: float
) -> tuple[float, float] | None:
    """The interval where every value is from ``least`` to ``most``; None where `interval` is for other reasons than that.

    Each end is the one of ``ends``, which may be None, unless that is on the wrong side of the mean or farther from it than it can be.

    Args:
        ends: From `interval`.
        values: Means of the documents, ``[U]``.
        mean: Over all tokens.
        least: The smallest possible value.
        most: The largest.
    """
    if len(values) < FEWEST_DOCUMENTS or values.min() == values.max():
        return None
    low, high = (least + (most - least) * end for end in share_interval((mean - least) / (most - least), len(values)))
    if ends is None:  # not finite
        return low, high
    return ends[0] if low <= ends[0] <= mean else low, ends[1] if mean <= ends[1] <= high else high


def resampled(document: Tensor, units: str = "documents") -> str | None:
    """`Quality.resampled`: the units that the intervals are computed over."""
    return units if len(document.unique()) >= FEWEST_DOCUMENTS else None


@torch.inference_mode()
def token_values(
    model: Any, reference: Reference, progress: Progress = iter
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each metric at each position, float64 ``[P]``; and the variance of those that are estimates, float64 ``[P]``.

    The value is NaN where a metric counts not every position. A metric that counts none is left out.

    Raises:
        HfQuantError: As for `evaluate`.
    """
    require_predictions(model)
    values: dict[str, list[Tensor]] = {}
    variances: dict[str, list[Tensor]] = {}
    for part in progress(reference):
        log_q = log_probabilities(model, part.piece)
        if log_q.shape[-1] != reference.meta["vocabulary"]:
            raise HfQuantError(
                f"vocabularies differ: {log_q.shape[-1]} tokens, the base has {reference.meta['vocabulary']}"
            )
        for name, metric in all_metrics().items():
            measured = metric.measure(part.base, log_q, part.piece.target)
            value, *variance = measured if isinstance(measured, tuple) else (measured,)
            _require_finite(value, metric.title, part.piece)
            if metric.where is not None:
                value = value.where(metric.where(part.base, part.piece.target, part.piece.inside), torch.nan)
            values.setdefault(name, []).append(value.double())
            if variance:
                variances.setdefault(name, []).append(variance[0].double())
    whole, error = ({n: torch.cat(chunks) for n, chunks in kept.items()} for kept in (values, variances))
    return {name: value for name, value in whole.items() if not value.isnan().all()}, error


def _require_finite(value: Tensor, title: str, piece: Piece) -> None:
    bad = (~value.isfinite()).nonzero()
    if len(bad):
        where = piece.row(int(bad[0]))
        raise HfQuantError(
            f"{title} is not finite in {where}: the model rules out a token that its base holds possible"
        )
