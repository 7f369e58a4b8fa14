"""Calibration data: text in any form becomes windows of tokens, identified by the hash of their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_quant.data.batches import (
    Inputs,
    are_batches,
    checked_batches,
    digest_of,
    hashes_of,
    holds_inputs,
    read_batches,
)
from hf_quant.data.chat import Chat
from hf_quant.data.given import as_source
from hf_quant.data.text import SEPARATOR, Text, dataset_rows, documents, paragraphs, read_documents, read_text, windows
from hf_quant.errors import HfQuantError

BUNDLED = Path(__file__).parent / "bundled" / "calibration.txt"  # Python's documentation; its licence lies beside it
FEWEST = 2  # sequences: some are held out
Source = Tensor | Sequence[str] | str | Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Calibration:
    """What calibrated methods look at: tokens, or batches of other inputs of a model.

    Attributes:
        ids: int64 ``[S, T]``; empty where there are batches.
        name: Name of the text.
        paragraphs: Hashes of its paragraphs, or of what is in the batches, so that it is not used for measuring too.
        batches: Inputs of the model, checked.
        rendered: What else decided the text, as `Chat.to_dict` says it.
    """

    ids: Tensor
    name: str
    paragraphs: list[str]
    batches: tuple[Inputs, ...] = ()
    rendered: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_batches(cls, source: Iterable[Mapping[str, Any]], name: str = "batches") -> Calibration:
        """Batches of inputs, as a processor returns them; see `batches.checked_batches`."""
        batches = checked_batches(source)
        return cls(torch.zeros(0, 0, dtype=torch.int64), name, hashes_of(batches), batches)

    @property
    def sha256(self) -> str:
        """Identifies the token ids, or the batches."""
        if self.batches:
            return digest_of(self.batches)
        return hashlib.sha256(f"{tuple(self.ids.shape)} ".encode() + self.ids.numpy().tobytes()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """For the recipe, without the text."""
        if self.batches:
            return {
                "name": self.name, "batches": len(self.batches), "inputs": sorted(self.batches[0]), "sha256": self.sha256,
                "paragraphs": self.paragraphs,
            }  # fmt: skip
        return {
            "name": self.name, "sequences": self.ids.shape[0], "context": self.ids.shape[1],
            "sha256": self.sha256, "paragraphs": self.paragraphs, **self.rendered,
        }  # fmt: skip


def calibration(
    source: Source | None, tokenizer: Any, context: int, tokens: int, vocabulary: int, chat: Chat | None = None
) -> Calibration:
    """Windows of ``context`` tokens, about ``tokens`` in all, spread evenly over the text.

    Args:
        source: Token ids ``[S, T]``, used as they are, or a safetensors file with them; texts, or rows with ``text`` or
            ``messages``; a UTF-8 file, or a JSONL file with such rows; a data set as in `text.dataset_rows`; None for the
            bundled text. Or batches of inputs, as in `batches.checked_batches`, or a safetensors file with inputs by their names.
        tokenizer: Of the model. May be None if ids are given; otherwise it decodes them, to find out later whether a text for
            measuring overlaps with them.
        context: Tokens in a window.
        tokens: Number of tokens, at least 1.
        vocabulary: Size of the model's vocabulary, which ids must be below.
        chat: Renders ``messages``; None for the chat template of ``tokenizer`` as it is.

    Raises:
        HfQuantError: The text is missing, too short or malformed, or an id is out of range; says where.
    """
    source = as_source(source)
    if are_batches(source):
        return Calibration.of_batches(source)
    name = "token ids"
    if _is_file_of_tensors(source):
        name, path = Path(source).name, Path(source)
        if holds_inputs(path):
            return Calibration.of_batches(read_batches(path), name)
        source = _ids_in(path)
    if isinstance(source, Tensor):
        data = Calibration(_ids(source), name, [])
    else:
        if type(tokens) is not int or tokens < 1:
            raise HfQuantError(f"calibration_tokens must be a whole number from 1, got {tokens!r}")
        if tokenizer is None:
            raise HfQuantError(
                "calibration: the model has no tokenizer; pass token ids instead, or a safetensors file with them"
            )
        chat = chat or Chat(tokenizer)
        before = chat.applied
        name, text = _read(cast("Sequence[str] | str | Path | None", source), chat)
        ids = windows(tokenizer, text, context, tokens).ids
        data = Calibration(ids, name, sorted(paragraphs(text)), rendered=chat.to_dict(since=before))
    low, high = int(data.ids.min()), int(data.ids.max())
    if low < 0 or high >= vocabulary:
        where = (data.ids == (low if low < 0 else high)).nonzero()[0].tolist()
        raise HfQuantError(f"calibration: token id {low if low < 0 else high} in sequence {where[0]} at {where[1]} is "
                           f"outside of the vocabulary of {vocabulary}")  # fmt: skip
    if data.ids.shape[0] < FEWEST:
        need = FEWEST * data.ids.shape[1]
        raise HfQuantError(
            f"calibration: {data.ids.shape[0]} sequence of {data.ids.shape[1]} tokens is too little; at least {FEWEST} are needed, "
            f"{need:,} tokens: " + (f"--calibration-tokens {need}" if tokens < need else "name a longer text")
        )
    if isinstance(source, Tensor) and tokenizer is not None:
        texts = tokenizer.batch_decode(data.ids.tolist(), skip_special_tokens=True)
        data = replace(data, paragraphs=sorted(paragraphs(SEPARATOR.join(texts))))
    return data


def _is_file_of_tensors(source: Source | None) -> TypeGuard[str | Path]:
    """Whether a file of that name holds tensors, and no text."""
    return isinstance(source, str | Path) and Path(source).suffix == ".safetensors"


def _ids_in(path: Path) -> Tensor:
    tensors = load_file(path)
    if len(tensors) != 1:
        raise HfQuantError(f"{path.name}: holds {len(tensors)} tensors, and token ids are one, int64 [S, T]")
    return next(iter(tensors.values()))


def _ids(source: Tensor) -> Tensor:
    if source.ndim != 2 or source.is_floating_point() or source.dtype == torch.bool or not source.numel():
        raise HfQuantError(
            f"calibration: token ids must be whole numbers [S, T], got {source.dtype} {list(source.shape)}"
        )
    return source.to(torch.int64).contiguous()


def _read(source: Sequence[str] | str | Path | None, chat: Chat) -> tuple[str, Text]:
    """Name and text."""
    if source is None:
        return "the bundled text (documentation of Python)", read_text(BUNDLED)
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_file():
            return path.name, read_documents(path, chat)
        if isinstance(source, Path) or path.suffix in (".txt", ".jsonl", ".md"):
            raise HfQuantError(f"calibration: {source}: no such file")
        return str(source), documents(str(source), dataset_rows(str(source), "train"), chat)
    if not source:
        raise HfQuantError("calibration: texts must be a list of strings that is not empty")
    if not all(isinstance(text, str) for text in source):
        return "texts", documents("of calibration", source, chat)
    return "texts", SEPARATOR.join(source)
