"""What quantization cost: a model beside its base, on the same held-out text.

The base's outputs are computed once and kept on disk (`reference`), so the two models are never in memory together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import HfQuantError
from hf_quant.evaluation.bootstrap import FEWEST, interval, sums
from hf_quant.evaluation.metrics import all_metrics
from hf_quant.evaluation.metrics.kl import tail
from hf_quant.evaluation.reference import Progress, Reference, log_probabilities, require_causal
from hf_quant.results import Estimate, Quality


@torch.inference_mode()
def evaluate(model: Any, reference: Reference, progress: Progress = iter) -> Quality:
    """Measure ``model`` against a base.

    Args:
        model: A causal language model.
        reference: The base's word on a text.
        progress: Wraps the list of batches, for a progress bar.

    Raises:
        HfQuantError: The vocabularies differ, a model is no causal language model, or logits are not finite.
    """
    values, variance = token_values(model, reference, progress)
    made, few = reference.windows, len(reference.windows.document.unique()) < FEWEST
    window = torch.arange(len(made.ids))[:, None].expand_as(made.scored)
    unit = (window if few else made.document[:, 1:])[made.scored]
    noise = reference.meta["noise"]
    metrics = {}
    for name, metric in all_metrics().items():
        total, count = sums(values[name], unit)
        low, high = map(metric.finish, interval(total, count))
        value = metric.finish((total.sum() / count.sum()).item())
        metrics[name] = with_noise(value, low, high, noise.get(name), metric.ideal)
    quantiles = {
        f"{name}_p{100 * q:g}": values[name].double().quantile(q).item()
        for name, metric in all_metrics().items()
        for q in metric.quantiles
    }
    tokens = int(made.scored.sum())
    return Quality(
        kind="causal", tokens=tokens, documents=len(made.document.unique()),
        resampled="windows" if few else "documents", context=made.ids.shape[1], stride=made.stride,
        text_sha256=made.sha256, dtype=str(model.dtype).removeprefix("torch."),
        base_dtype=reference.meta["base_dtype"], metrics=metrics, quantiles=quantiles,
        kl_error=3 * math.sqrt(variance.sum().item()) / tokens,
    )  # fmt: skip


def means(model: Any, reference: Reference, progress: Progress = iter) -> dict[str, float]:
    """Every metric's value, without intervals."""
    values, _ = token_values(model, reference, progress)
    return {name: metric.finish(values[name].double().mean().item()) for name, metric in all_metrics().items()}


def with_noise(value: float, low: float, high: float, noise: float | None, ideal: float | None) -> Estimate:
    """An estimate that knows whether its interval reaches as near to ``ideal`` as the base's own rounding comes."""
    if noise is None or ideal is None:
        return Estimate(value, low, high, noise)
    distance = 0.0 if low <= ideal <= high else min(abs(low - ideal), abs(high - ideal))
    return Estimate(value, low, high, noise, distance <= abs(noise - ideal))


@torch.inference_mode()
def token_values(model: Any, reference: Reference, progress: Progress = iter) -> tuple[dict[str, Tensor], Tensor]:
    """Each metric at each position, ``[P]``, and the variance of KL from sampling the tail."""
    require_causal(model)
    metrics = all_metrics()
    values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    variances, batch = [], reference.meta["batch"]
    for i, part in enumerate(progress(reference)):
        log_q = log_probabilities(model, part.ids, part.scored, i * batch)
        if log_q.shape[-1] != reference.meta["vocabulary"]:
            raise HfQuantError(
                f"vocabularies differ: {log_q.shape[-1]} tokens, the base has {reference.meta['vocabulary']}"
            )
        for name, metric in metrics.items():
            values[name].append(metric.measure(part.base, log_q, part.target))
        m = part.base.tail.shape[-1]
        variances.append(tail(part.base, log_q).double().var(-1) / m if m else torch.zeros(len(log_q)).double())
    return {name: torch.cat(each) for name, each in values.items()}, torch.cat(variances)
