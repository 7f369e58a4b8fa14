"""What quantization costs an encoder of text, images or sounds: cosine similarity of its embeddings and logits to the base's.

Of a classifier, and of a model that predicts masked tokens, also the share of predictions that stay the same.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.data.batches import Inputs, digest_of, samples_in, without_padding
from hf_quant.data.held_out import PURPOSE
from hf_quant.data.text import Text, split
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.measure import estimate, resampled
from hf_quant.evaluation.reference import Load, Progress
from hf_quant.evaluation.results import Quality
from hf_quant.hf.batch_inputs import arguments, inputs_for, on_device, same_draws

SHORTEST = 40  # characters; shorter paragraphs are headings
POSITIONS = 8  # positions of a passage at which logits are compared
EMBEDDINGS = ("image_embeds", "text_embeds", "audio_embeds", "video_embeds")  # of models with several encoders


@dataclass(frozen=True)
class Passages:
    """What is read: passages of a text one by one, or batches of samples.

    Attributes:
        batches: Arguments of the model.
        document: ``[D]``, the number of the document that each passage comes from; of samples, their numbers.
        context: The most tokens in one of them; 0 where there are none.
        inputs: Names of the inputs of samples; empty for a text.
    """

    batches: Sequence[Inputs]
    document: Tensor
    context: int
    inputs: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Identity of the tokens, or of the batches."""
        if self.inputs:
            return digest_of(self.batches)
        return hashlib.sha256(b"".join(batch["input_ids"].numpy().tobytes() for batch in self.batches)).hexdigest()

    @property
    def amount(self) -> int:
        """Tokens that are read; of inputs without tokens, samples."""
        if self.inputs and "input_ids" not in self.inputs:
            return len(self.document)
        return sum(int(_mask(batch).sum()) for batch in self.batches)


def sample_passages(model: Any, batches: Sequence[Inputs]) -> Passages:
    """Batches of inputs as `data.batches.checked_batches` returns them, for ``model``, which may be on the meta device.

    Raises:
        HfQuantError: The model takes no such inputs, or needs others.
    """
    given = inputs_for(model, batches, PURPOSE)
    context = max(batch["input_ids"].shape[-1] if "input_ids" in batch else 0 for batch in given)
    count = sum(map(samples_in, given))
    return Passages(given, torch.arange(count), context, tuple(sorted(given[0])))


def _mask(batch: Inputs) -> Tensor:
    """Which token ids are no padding."""
    return without_padding(batch["input_ids"], batch.get("attention_mask"))


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
    batches = [{"input_ids": tokenized[i]} for i in picked]
    return Passages(batches, torch.tensor([texts[i][0] for i in picked]), context)


def _passages_of(document: str) -> list[str]:
    """The paragraphs except very short ones (headings), or the lines."""
    if "\n\n" in document.strip():
        return [part.strip() for part in document.split("\n\n") if len(part.strip()) >= SHORTEST]
    return [line.strip() for line in document.splitlines() if line.strip()]


@torch.inference_mode()
def outputs(model: Any, texts: Passages, progress: Progress = iter) -> dict[str, list[Tensor]]:
    """For each passage or sample: an embedding ``[H]``, and logits ``[<= POSITIONS, V]`` if the model has them.

    Raises:
        HfQuantError: The model gives NaN or infinite values, or neither hidden states nor logits.
    """
    collected: dict[str, list[Tensor]] = {"embedding_cosine": [], "logits_cosine": []}
    encoder = _reader(model, texts)
    for batch in progress(texts.batches):
        with same_draws():
            out = encoder(**arguments(encoder, on_device(model, batch)), **_asked(encoder))
        mask = _mask(batch) if "input_ids" in batch else None
        for name, rows in _compared_outputs(out, mask, samples_in(batch), model.config).items():
            for row in rows:  # float64: what is missing to 1 is looked at
                collected[name].append(row.cpu().double())
                if not collected[name][-1].isfinite().all():
                    what = f"{'sample' if texts.inputs else 'passage'} {len(collected[name]) - 1}"
                    raise HfQuantError(f"outputs of {type(model).__name__} are not finite in {what}")
    if not any(collected.values()):
        raise HfQuantError(f"{type(model).__name__} gives neither hidden states nor logits, which could be compared")
    return {name: values for name, values in collected.items() if values}


def _reader(model: Any, texts: Passages) -> Any:
    """What reads a text or samples: the model, or the encoder of one whose decoder is given nothing to say.

    A classifier with a decoder hands its inputs on to it, so it runs as it is; only a text may lack the end that it looks for.
    """
    takes = inspect.signature(model.forward).parameters
    if not getattr(model.config, "is_encoder_decoder", False) or "decoder_input_ids" not in takes:
        return model
    classifies = texts.inputs and "labels" in takes
    return model if classifies or "decoder_input_ids" in texts.batches[0] else model.get_encoder()


def _asked(encoder: Any) -> dict[str, bool]:
    """Hidden states, where it is a question that the model understands."""
    takes = inspect.signature(encoder.forward).parameters.values()
    understood = any(p.name == "output_hidden_states" or p.kind is p.VAR_KEYWORD for p in takes)
    return {"output_hidden_states": True} if understood else {}


def _compared_outputs(out: Any, mask: Tensor | None, samples: int, config: Any) -> dict[str, list[Tensor]]:
    """What is compared of each sample."""
    outputs_of: dict[str, list[Tensor]] = {}
    if (hidden := _hidden(out)) is not None:
        rows = _rows(hidden, samples)
        masks = [None] * samples if mask is None else list(mask)
        outputs_of["embedding_cosine"] = [_embedding(row, kept) for row, kept in zip(rows, masks, strict=True)]
    if isinstance(logits := getattr(out, "logits", None), Tensor):
        if logits.ndim > 3 and logits.shape[1] == getattr(config, "num_labels", 0) != logits.shape[-1]:
            logits = logits.movedim(1, -1)  # of each pixel
        outputs_of["logits_cosine"] = [_positions(row) for row in _rows(logits, samples)]
    return outputs_of


def _hidden(out: Any) -> Tensor | None:
    """The last hidden states of a model, or those of its encoder; of one that embeds images and text, both embeddings."""
    last, states = getattr(out, "last_hidden_state", None), getattr(out, "hidden_states", None)
    if last is None:
        last = states[-1] if states else getattr(out, "encoder_last_hidden_state", None)
    if last is None:
        embeddings = [tensor for name in EMBEDDINGS if (tensor := getattr(out, name, None)) is not None]
        alike = len({len(tensor) for tensor in embeddings}) == 1
        last = torch.cat(embeddings, -1) if alike else None
    return last if isinstance(last, Tensor) else None


def _rows(tensor: Tensor, samples: int) -> list[Tensor]:
    """The part of each sample; all of it where it belongs to a single one."""
    if samples == 1:
        return [tensor[0] if len(tensor) == 1 else tensor]
    if len(tensor) != samples:
        raise HfQuantError(f"outputs {list(tensor.shape)} of {samples} samples: which belongs to which cannot be told")
    return list(tensor)


def _embedding(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the hidden states ``[T, H]`` of one sample without padding; features in another form as they are."""
    if hidden.ndim != 2:
        return hidden.flatten()
    hidden = hidden.cpu()  # not every device has float64
    kept = hidden if mask is None or len(mask) != len(hidden) else hidden[mask]
    return kept.double().mean(0)


def _positions(logits: Tensor) -> Tensor:
    """Logits of one sample at some of its positions, spread evenly."""
    logits = logits.flatten(0, -2) if logits.ndim > 1 else logits[None]
    return logits[:: -(-len(logits) // POSITIONS)]


def without_logits(kind: Any) -> bool:
    """Whether a class of models says in the type of its outputs that it gives no logits; False where it does not say."""
    try:
        returned = get_type_hints(kind.forward).get("return")
    except (NameError, TypeError):
        return False
    outputs_of = [output for output in get_args(returned) or (returned,) if is_dataclass(output)]
    return bool(outputs_of) and not any(field.name == "logits" for output in outputs_of for field in fields(output))


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
    model: Any, base: dict[str, Any], texts: Passages, progress: Callable[..., Any] = iter
) -> Quality:
    """Cosine similarities of ``model`` to a base, with intervals over documents or samples.

    Args:
        model: An encoder, or an encoder-decoder model whose encoder is measured.
        base: From `base_outputs`.
        texts: The passages or samples.
        progress: Wraps the list of batches.

    Raises:
        HfQuantError: Outputs are not finite, or differ in shape.
    """
    metrics = {
        name: estimate(values, texts.document, noise=base["noise"].get(name), ideal=1, most=1)
        for name, values in _compared(base["outputs"], outputs(model, texts, progress)).items()
    }
    return Quality(
        kind="encoder", tokens=texts.amount, documents=len(texts.document.unique()),
        resampled=resampled(texts.document, "samples" if texts.inputs else "documents"), context=texts.context,
        stride=texts.context, inputs=list(texts.inputs), text_sha256=texts.sha256,
        dtype=str(model.dtype).removeprefix("torch."), base_dtype=base["dtype"], metrics=metrics,
    )  # fmt: skip
