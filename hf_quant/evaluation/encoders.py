"""What quantization cost an encoder: cosine similarity of its sentence embeddings, and of its logits, to the base's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.errors import HfQuantError
from hf_quant.evaluation import with_noise
from hf_quant.evaluation.bootstrap import FEWEST, interval, sums
from hf_quant.evaluation.reference import Load, Progress
from hf_quant.results import Estimate, Quality
from hf_quant.text import split

SHORTEST = 40  # characters of a passage
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
    """Paragraphs of ``text``, cut off at ``context`` tokens, spread evenly over it if ``max_tokens`` limits them.

    Raises:
        HfQuantError: There are none.
    """
    found = [(i, p) for i, d in enumerate(split(text)) for p in d.split("\n\n") if len(p.strip()) >= SHORTEST]
    if not found:
        raise HfQuantError(f"the text has no paragraph of {SHORTEST} characters")
    made = [torch.tensor(tokenizer(p.strip(), truncation=True, max_length=context).input_ids)[None] for _, p in found]
    mean = sum(i.shape[1] for i in made) / len(made)
    wanted = min(len(made), max(1, int((max_tokens or mean * len(made)) / mean)))
    chosen = [i * len(made) // wanted for i in range(wanted)]
    return Passages([made[i] for i in chosen], torch.tensor([found[i][0] for i in chosen]))


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
        found = {"embedding_cosine": hidden[0].float().mean(0).cpu()}
        if getattr(out, "logits", None) is not None:
            logits = out.logits.float().flatten(0, -2)
            found["logits_cosine"] = logits[:: -(-len(logits) // POSITIONS)].cpu()
        for name, value in found.items():
            if not value.isfinite().all():
                raise HfQuantError(f"outputs of {type(model).__name__} are not finite in passage {i}")
            made[name].append(value)
    return {name: values for name, values in made.items() if values}


def _cosines(base: dict[str, list[Tensor]], model: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    if {n: v[0].shape for n, v in base.items()} != {n: v[0].shape for n, v in model.items()}:
        raise HfQuantError("the outputs differ in shape from the base's")
    return {
        name: torch.stack([F.cosine_similarity(p, q, dim=-1).mean() for p, q in zip(values, model[name], strict=True)])
        for name, values in base.items()
    }


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
    few = len(texts.document.unique()) < FEWEST
    unit = torch.arange(len(texts.ids)) if few else texts.document
    metrics: dict[str, Estimate] = {}
    for name, values in _cosines(base["outputs"], outputs(model, texts, progress)).items():
        total, count = sums(values, unit)
        low, high = interval(total, count)
        metrics[name] = with_noise(values.double().mean().item(), low, high, base["noise"].get(name), 1.0)
    return Quality(
        kind="encoder", tokens=sum(i.shape[1] for i in texts.ids), documents=len(texts.document.unique()),
        resampled="windows" if few else "documents", context=context, stride=context, text_sha256=texts.sha256,
        dtype=str(model.dtype).removeprefix("torch."), base_dtype=base["dtype"], metrics=metrics,
    )  # fmt: skip
