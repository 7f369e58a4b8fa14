"""Prefill and decode speed; models take turns, so that a slowdown of the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch

from hf_quant.hf._compat import cache_argument
from hf_quant.hf.auto import vocabulary_of
from hf_quant.hf.kv_cache import cache_bytes

WARM_UP = 1


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of one model at one batch size; medians over the repeats.

    Attributes:
        batch: Number of sequences.
        prompt: Tokens in each prompt.
        new: Tokens generated for each prompt.
        prefill: Prompt tokens per second, all sequences together.
        decode: Generated tokens per second, all sequences together, without the first token of each.
        first_token: Seconds from the prompt to the first token.
        prefill_spread: Interquartile range of ``prefill`` over its median.
        decode_spread: Interquartile range of ``decode`` over its median.
        cache_bytes: Size of the keys and values at the end, all sequences together.
    """

    batch: int
    prompt: int
    new: int
    prefill: float
    decode: float
    first_token: float
    prefill_spread: float
    decode_spread: float
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.inference_mode()
def once(model: Any, batch: int, prompt: int, new: int, cache: str | None = None) -> tuple[float, float, int]:
    """Seconds to the first token, seconds for the ``new - 1`` tokens that follow (greedy, with a cache), and the cache's bytes."""
    vocabulary = vocabulary_of(model.config)
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    _wait(model)
    start = time.perf_counter()
    cache_kwargs = cache_argument(model, cache)
    out = model(ids, use_cache=True, logits_to_keep=1, **cache_kwargs)
    token = out.logits[:, -1:].argmax(-1)
    _wait(model)
    first = time.perf_counter()
    for _ in range(new - 1):
        out = model(token, use_cache=True, **cache_kwargs)
        token = out.logits[:, -1:].argmax(-1)
    _wait(model)
    return first - start, time.perf_counter() - first, cache_bytes(next(iter(cache_kwargs.values())))


def compare(
    models: Mapping[str, Any], batches: Sequence[int], *, prompt: int = 128, new: int = 32, repeats: int = 5,
    progress: Callable[[Any], Any] = iter, caches: Mapping[str, str | None] = MappingProxyType({}),
) -> dict[str, list[Speed]]:  # fmt: skip
    """Measure every model at every batch size.

    Args:
        models: Name to causal language model, all of them loaded.
        batches: Numbers of sequences.
        prompt: Number of random tokens in each prompt.
        new: Number of tokens to generate for each, at least 2.
        repeats: Number of measured turns; a warm-up turn comes first.
        progress: Wraps the list of turns.
        caches: Model name to the kind of its cache, ``"int8"`` or ``"int4"``; others have one in floating point.
    """
    times: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
    for turn, batch in progress([(turn, batch) for batch in batches for turn in range(WARM_UP + repeats)]):
        names = list(models)
        for name in names if turn % 2 else names[::-1]:
            took = once(models[name], batch, prompt, new, caches.get(name))
            if turn >= WARM_UP:
                times.setdefault((name, batch), []).append(took)
    return {name: [_speed(times[name, batch], batch, prompt, new) for batch in batches] for name in models}


def _speed(times: list[tuple[float, float, int]], batch: int, prompt: int, new: int) -> Speed:
    first, rest = [t[0] for t in times], [t[1] for t in times]
    return Speed(
        batch, prompt, new, batch * prompt / statistics.median(first), batch * (new - 1) / statistics.median(rest),
        statistics.median(first), _spread(first), _spread(rest), times[-1][2],
    )  # fmt: skip


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def _wait(model: Any) -> None:
    if model.device.type != "cpu":
        torch.get_device_module(model.device).synchronize()
