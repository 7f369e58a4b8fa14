"""What quantization costs an encoder: cosine similarity of its sentence embeddings and logits to those of the base.

Of a classifier, and of a model that predicts masked tokens, also the share of predictions that stay the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.data.text import Text, split
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.measure import estimate, resampled
from hf_quant.evaluation.reference import Load, Progress
from hf_quant.evaluation.results import Quality

SHORTEST = 40  # characters; shorter paragraphs are headings
POSITIONS = 8  # positions of a passage at which logits are compared


@dataclass(frozen=True)
class Passages:
    """Attributes: ids, one ``[1, T]`` each; document: ``[D]``, the number of the document that each passage comes from."""

    ids: list[Tensor]
    document: Tensor

    @property
    def sha256(self) -> str:
        """Identity of the tokens."""
        return hashlib.sha256(b"".join(i.numpy().tobytes() for i in self.ids)).hexdigest()


def passages(tokenizer: Any, text: Text, context: int, max_tokens: int | None = None) -> Passages:
    """Passages of ``text``, truncated to ``context`` tokens; ``max_tokens`` picks some, spread evenly over the text.

    The passages of a document are its paragraphs, or its lines where it has no empty line. A text of a single document is a
    list of sentences, so each of its lines counts as a document.

    Raises:
        HfQuantError: The text has no passage.
    """
    documents = [_passages_of(document) for document in split(text)]
    if len(documents) == 1 and "\n\n" not in split(text)[0].strip():
        documents = [[line] for line in documents[0]]
    texts = [(i, passage) for i, document in enumerate(documents) for passage in document]
    if not texts:
        raise HfQuantError(f"the text has no paragraph of {SHORTEST} characters")
    tokenized = [torch.tensor(tokenizer(p, truncation=True, max_length=context).input_ids)[None] for _, p in texts]
    mean = sum(i.shape[1] for i in tokenized) / len(tokenized)
    count = min(len(tokenized), max(1, int((max_tokens or mean * len(tokenized)) / mean)))
    picked = [i * len(tokenized) // count for i in range(count)]
    return Passages([tokenized[i] for i in picked], torch.tensor([texts[i][0] for i in picked]))


def _passages_of(document: str) -> list[str]:
    """The paragraphs except very short ones (headings), or the lines."""
    if "\n\n" in document.strip():
        return [part.strip() for part in document.split("\n\n") if len(part.strip()) >= SHORTEST]
    return [line.strip() for line in document.splitlines() if line.strip()]


@torch.inference_mode()
def outputs(model: Any, texts: Passages, progress: Progress = iter) -> dict[str, list[Tensor]]:
    """For each passage: the mean of the last hidden states ``[H]``, and logits ``[<= POSITIONS, V]`` if the model has them.

    Raises:
        HfQuantError: The model gives NaN or infinite values.
    """
    encoder = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    collected: dict[str, list[Tensor]] = {"embedding_cosine": [], "logits_cosine": []}
    for i, ids in enumerate(progress(texts.ids)):
        out = encoder(input_ids=ids.to(model.device), output_hidden_states=True)
        hidden = out.hidden_states[-1] if getattr(out, "last_hidden_state", None) is None else out.last_hidden_state
        batch = {"embedding_cosine": hidden[0].cpu().double().mean(0)}  # float64: what is missing to 1 is looked at
        if getattr(out, "logits", None) is not None:
            logits = out.logits.flatten(0, -2)
            batch["logits_cosine"] = logits[:: -(-len(logits) // POSITIONS)].cpu().double()
        for name, value in batch.items():
            if not value.isfinite().all():
                raise HfQuantError(f"outputs of {type(model).__name__} are not finite in passage {i}")
            collected[name].append(value)
    return {name: values for name, values in collected.items() if values}


def measures_of(base: dict[str, list[Tensor]]) -> list[str]:
    """The measures that the `outputs` of a base allow."""
    several = "logits_cosine" in base and base["logits_cosine"][0].shape[-1] > 1
    return [*base, "top1"] if several else list(base)


def _compared(base: dict[str, list[Tensor]], model: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Each measure for each passage, ``[D]``."""
    if {n: v[0].shape for n, v in base.items()} != {n: v[0].shape for n, v in model.items()}:
        raise HfQuantError("the outputs differ in shape from the base's")
    compared = {
        name: torch.stack([_cosine(p, q) for p, q in zip(values, model[name], strict=True)])
        for name, values in base.items()
    }
    if "top1" in measures_of(base):
        logits = zip(base["logits_cosine"], model["logits_cosine"], strict=True)
        compared["top1"] = torch.stack([(p.argmax(-1) == q.argmax(-1)).double().mean() for p, q in logits])
    return compared


def _cosine(p: Tensor, q: Tensor) -> Tensor:
    return F.cosine_similarity(p, q, dim=-1).clamp(max=1).mean()  # rounding can exceed 1


def base_outputs(load_base: Load, texts: Passages, dtype: torch.dtype, progress: Progress = iter) -> dict[str, Any]:
    """The outputs, dtype and noise of the base for `evaluate_encoder`; the base is freed before this returns."""
    exact = outputs(load_base(dtype), texts, progress)
    noise: dict[str, float] = {}
    if dtype is not torch.bfloat16:
        coarse = _compared(exact, outputs(load_base(torch.bfloat16), texts, progress))
        noise = {name: values.mean().item() for name, values in coarse.items()}
    return {"outputs": exact, "dtype": str(dtype).removeprefix("torch."), "noise": noise}


def evaluate_encoder(
    model: Any, base: dict[str, Any], texts: Passages, context: int, progress: Callable[..., Any] = iter
) -> Quality:
    """Cosine similarities of ``model`` to a base, with intervals over documents.

    Args:
        model: An encoder, or an encoder-decoder model whose encoder is measured.
        base: From `base_outputs`.
        texts: The passages.
        context: The length that they were truncated to.
        progress: Wraps the list of passages.

    Raises:
        HfQuantError: Outputs are not finite, or differ in shape.
    """
    metrics = {
        name: estimate(values, texts.document, noise=base["noise"].get(name), ideal=1, most=1)
        for name, values in _compared(base["outputs"], outputs(model, texts, progress)).items()
    }
    return Quality(
        kind="encoder", tokens=sum(i.shape[1] for i in texts.ids), documents=len(texts.document.unique()),
        resampled=resampled(texts.document), context=context, stride=context, text_sha256=texts.sha256,
        dtype=str(model.dtype).removeprefix("torch."), base_dtype=base["dtype"], metrics=metrics,
    )  # fmt: skip
