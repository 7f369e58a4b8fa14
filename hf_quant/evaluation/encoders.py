"""What quantization cost an encoder: cosine similarity of its sentence embeddings, and of its logits, to the base's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.data.text import split
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.measure import estimate, resampled
from hf_quant.evaluation.reference import Load, Progress
from hf_quant.evaluation.results import Quality

SHORTEST = 40  # characters of a paragraph
POSITIONS = 8  # of a passage, whose logits are compared


@dataclass(frozen=True)
class Passages:
    """Attributes: ids, one ``[1, T]`` each; document: which one each comes from, ``[D]``."""

    ids: list[Tensor]
    document: Tensor

    @property
    def sha256(self) -> str:
        """Identity of the tokens."""
        return hashlib.sha256(b"".join(i.numpy().tobytes() for i in self.ids)).hexdigest()


def passages(tokenizer: Any, text: str, context: int, max_tokens: int | None = None) -> Passages:
    """Passages of ``text``, cut off at ``context`` tokens, spread evenly over it if ``max_tokens`` limits them.

    A document's passages are its paragraphs, or its lines where it has no empty line. Lines of a text that is one document
    are documents of their own: such a text is a list of sentences.

    Raises:
        HfQuantError: There are none.
    """
    documents = [_passages_of(document) for document in split(text)]
    if len(documents) == 1 and "\n\n" not in split(text)[0].strip():
        documents = [[line] for line in documents[0]]
    found = [(i, passage) for i, document in enumerate(documents) for passage in document]
    if not found:
        raise HfQuantError(f"the text has no paragraph of {SHORTEST} characters")
    made = [torch.tensor(tokenizer(p, truncation=True, max_length=context).input_ids)[None] for _, p in found]
    mean = sum(i.shape[1] for i in made) / len(made)
    wanted = min(len(made), max(1, int((max_tokens or mean * len(made)) / mean)))
    chosen = [i * len(made) // wanted for i in range(wanted)]
    return Passages([made[i] for i in chosen], torch.tensor([found[i][0] for i in chosen]))


def _passages_of(document: str) -> list[str]:
    """Paragraphs without the very short ones (headings), or lines."""
    if "\n\n" in document.strip():
        return [part.strip() for part in document.split("\n\n") if len(part.strip()) >= SHORTEST]
    return [line.strip() for line in document.splitlines() if line.strip()]


@torch.inference_mode()
def outputs(model: Any, texts: Passages, progress: Progress = iter) -> dict[str, list[Tensor]]:
    """Of each passage: the mean of the last hidden states ``[H]``, and logits ``[<= POSITIONS, V]`` if there are any.

    Raises:
        HfQuantError: The model gives NaN or infinite values.
    """
    encoder = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    made: dict[str, list[Tensor]] = {"embedding_cosine": [], "logits_cosine": []}
    for i, ids in enumerate(progress(texts.ids)):
        out = encoder(input_ids=ids.to(model.device), output_hidden_states=True)
        hidden = out.hidden_states[-1] if getattr(out, "last_hidden_state", None) is None else out.last_hidden_state
        found = {"embedding_cosine": hidden[0].cpu().double().mean(0)}  # float64: what is missing to 1 is looked at
        if getattr(out, "logits", None) is not None:
            logits = out.logits.flatten(0, -2)
            found["logits_cosine"] = logits[:: -(-len(logits) // POSITIONS)].cpu().double()
        for name, value in found.items():
            if not value.isfinite().all():
                raise HfQuantError(f"outputs of {type(model).__name__} are not finite in passage {i}")
            made[name].append(value)
    return {name: values for name, values in made.items() if values}


def _cosines(base: dict[str, list[Tensor]], model: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    if {n: v[0].shape for n, v in base.items()} != {n: v[0].shape for n, v in model.items()}:
        raise HfQuantError("the outputs differ in shape from the base's")
    return {
        name: torch.stack([_cosine(p, q) for p, q in zip(values, model[name], strict=True)])
        for name, values in base.items()
    }


def _cosine(p: Tensor, q: Tensor) -> Tensor:
    return F.cosine_similarity(p, q, dim=-1).clamp(max=1).mean()  # rounding may go beyond


def base_outputs(load_base: Load, texts: Passages, dtype: torch.dtype, progress: Progress = iter) -> dict[str, Any]:
    """What `evaluate_encoder` needs of the base, which is dropped before this returns: outputs, dtype and noise."""
    found = outputs(load_base(dtype), texts, progress)
    noise: dict[str, float] = {}
    if dtype is not torch.bfloat16:
        coarse = _cosines(found, outputs(load_base(torch.bfloat16), texts, progress))
        noise = {name: values.mean().item() for name, values in coarse.items()}
    return {"outputs": found, "dtype": str(dtype).removeprefix("torch."), "noise": noise}


def evaluate_encoder(
    model: Any, base: dict[str, Any], texts: Passages, context: int, progress: Callable[..., Any] = iter
) -> Quality:
    """Cosine similarities of ``model`` to a base, with intervals over documents.

    Args:
        model: An encoder, or an encoder-decoder, of which only the encoder is run.
        base: From `base_outputs`.
        texts: The passages.
        context: Where they were cut off.
        progress: Wraps the list of passages.

    Raises:
        HfQuantError: Outputs are not finite, or differ in shape.
    """
    metrics = {
        name: estimate(values, texts.document, noise=base["noise"].get(name), ideal=1, most=1)
        for name, values in _cosines(base["outputs"], outputs(model, texts, progress)).items()
    }
    return Quality(
        kind="encoder", tokens=sum(i.shape[1] for i in texts.ids), documents=len(texts.document.unique()),
        resampled=resampled(texts.document), context=context, stride=context, text_sha256=texts.sha256,
        dtype=str(model.dtype).removeprefix("torch."), base_dtype=base["dtype"], metrics=metrics,
    )  # fmt: skip
