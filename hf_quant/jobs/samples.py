"""What a quantized model and its base continue the same prompts with, greedily: for the report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_quant.errors import HfQuantError
from hf_quant.jobs.base import base_of, recipe_of
from hf_quant.jobs.options import hub
from hf_quant.jobs.texts import template_arguments
from hf_quant.publish.page_model import Sample

PROMPTS = ("The capital of France is", "Once upon a time, there was", "def fibonacci(n):", "The function returns")
TOKENS = 40


def samples(
    model: Path,
    base: str | None,
    prompts: Sequence[str] = PROMPTS,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> list[Sample]:
    """Continuations of both models, token by token.

    Args:
        model: Folder of the quantized model.
        base: What it was made from; None for what its recipe names.
        prompts: Texts to continue; with ``chat_template_kwargs``, messages of a user to answer.
        chat_template_kwargs: Arguments of the chat template.
        trust_remote_code: Run code that the checkpoints bring along.

    Raises:
        HfQuantError: The base is not known, or one of them cannot generate text.
    """
    from hf_quant.data.chat import Chat
    from hf_quant.hf import load
    from hf_quant.hf.auto import tokenizer_of

    name, revision = base_of(str(model), recipe_of(str(model)), base)
    of_base = hub(revision, trust_remote_code)
    tokenizer = tokenizer_of(name, **of_base)
    if tokenizer is None:
        raise HfQuantError(f"{name}: no tokenizer, so there are no sample texts")
    chat = Chat(tokenizer, template_arguments(chat_template_kwargs, (), asked=True))
    texts = [chat.question(prompt) for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        if not tokenizer(text).input_ids:
            raise HfQuantError(f"--prompt {prompt!r}: has no tokens, so there is nothing to continue")
    continued = [
        [_continued(loaded, tokenizer, text) for text in texts]
        for loaded in (load(name, **of_base).eval(), load(str(model), **hub(None, trust_remote_code)).eval())
    ]
    return [Sample(prompt, *both) for prompt, *both in zip(prompts, *continued, strict=True)]


def _continued(model: Any, tokenizer: Any, prompt: str) -> list[str]:
    """The new tokens, each as the text that it adds."""
    import torch

    from hf_quant.hf.auto import positions_of

    if not model.can_generate() or model.config.is_encoder_decoder:
        raise HfQuantError(f"{type(model).__name__} is no causal language model, so there are no sample texts")
    ids, most = torch.tensor([tokenizer(prompt).input_ids], device=model.device), positions_of(model)
    if most and ids.shape[1] + TOKENS > most:
        raise HfQuantError(
            f"--prompt: {ids.shape[1]:,} tokens and {TOKENS} new ones are more than the {most:,} positions of {model.name_or_path}"
        )
    mask = torch.ones_like(ids)  # all of it is text, whatever the padding token is
    new = model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
    texts = [tokenizer.decode(new[:end], skip_special_tokens=True) for end in range(len(new) + 1)]
    pairs = itertools.pairwise(texts)
    return [after[len(before) :] if after.startswith(before) else after for before, after in pairs]
