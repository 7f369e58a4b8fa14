"""What quantization cost: a model beside its base, on the same held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import HfQuantError
from hf_quant.evaluation.kl import kl, same_choice
from hf_quant.evaluation.perplexity import negative_log_likelihood
from hf_quant.evaluation.text import read_text as read_text
from hf_quant.evaluation.text import windows
from hf_quant.results import Quality


@torch.inference_mode()
def evaluate(
    model: Any, base: Any, tokenizer: Any, text: str, *,
    context: int = 512, max_tokens: int | None = None, batch: int = 4,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Quality:  # fmt: skip
    """Measure ``model`` against ``base``.

    Args:
        model: A causal language model.
        base: The one it was made from; both stay in memory.
        tokenizer: Of both.
        text: Held-out documents, separated by ``<|endoftext|>``.
        context: Tokens in a window.
        max_tokens: About how many tokens to use at most.
        batch: Windows in a forward pass.
        progress: Wraps the list of batches, for a progress bar.

    Raises:
        HfQuantError: The text is too short, the vocabularies differ, a model is no causal language model, or logits
            are not finite.
    """
    for each in (model, base):
        if not each.can_generate() or getattr(each.config, "is_encoder_decoder", False):
            raise HfQuantError(f"eval measures causal language models so far, not {type(each).__name__}")
    made = windows(tokenizer, text, context, max_tokens)
    divergences, agreed, own, other = [], 0, 0.0, 0.0
    at = 0
    for ids in progress(list(made.ids.split(batch))):
        reference, quantized = _log_probabilities(base, ids, at), _log_probabilities(model, ids, at)
        if reference.shape != quantized.shape:
            raise HfQuantError(
                f"vocabularies differ: {quantized.shape[-1]} tokens, the base has {reference.shape[-1]}"
            )
        divergences.append(kl(reference, quantized).flatten())
        agreed += int(same_choice(reference, quantized).sum())
        own += negative_log_likelihood(quantized, ids).double().sum().item()
        other += negative_log_likelihood(reference, ids).double().sum().item()
        at += len(ids)
    every = torch.cat(divergences).double()
    count = len(every)
    return Quality(
        tokens=count, documents=made.documents, context=context, text_sha256=made.sha256,
        perplexity=math.exp(own / count), base_perplexity=math.exp(other / count),
        kl_mean=every.mean().item(), kl_median=every.median().item(), kl_p99=every.quantile(0.99).item(),
        top1=agreed / count,
    )  # fmt: skip


def _log_probabilities(model: Any, ids: Tensor, at: int) -> Tensor:
    """Of each next token: float32 ``[B, T - 1, V]``."""
    logits = model(ids.to(model.device)).logits[:, :-1].float()
    if not logits.isfinite().all():
        bad = at + int((~logits.isfinite()).flatten(1).any(1).nonzero()[0])
        raise HfQuantError(f"logits of {type(model).__name__} are not finite in window {bad}")
    return logits.log_softmax(-1).to(ids.device)
