"""Held-out text as windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import HfQuantError

BUNDLED = Path(__file__).parent / "bundled" / "heldout.txt"  # Python's documentation; its licence lies beside it
SEPARATOR = "<|endoftext|>"
PARAGRAPH = 200  # characters; shorter ones (headings, licence lines) say nothing about where a text comes from


@dataclass(frozen=True)
class Windows:
    """Tokens to measure on.

    Attributes:
        ids: int64 ``[W, T]``.
        document: int64 ``[W, T]``, which document each token comes from.
        scored: bool ``[W, T - 1]``, whether the prediction of token t + 1 counts; False where windows overlap.
        stride: Tokens from one window to the next.
    """

    ids: Tensor
    document: Tensor
    scored: Tensor
    stride: int

    @property
    def sha256(self) -> str:
        """Identity of the tokens and of which are scored."""
        made = hashlib.sha256(f"{tuple(self.ids.shape)} {self.stride} ".encode())
        made.update(self.ids.numpy().tobytes() + self.scored.numpy().tobytes())
        return made.hexdigest()


def read_text(path: Path) -> str:
    """The file as UTF-8.

    Raises:
        HfQuantError: It is not; the message names the byte.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HfQuantError(f"{path.name}: not UTF-8 at byte {error.start}") from None


def dataset_rows(name: str, default_split: str = "test") -> list[Any]:
    """One column of a ``datasets`` set.

    Args:
        name: ``ID[:CONFIG][@SPLIT][#COLUMN][~REVISION]``; column ``text``, else ``messages``, where none is named.
        default_split: Where none is named.

    Raises:
        HfQuantError: ``datasets`` is not installed, or there is no such set or column.
    """
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise HfQuantError(f"{name}: needs the package datasets: pip install datasets") from None
    rest, _, revision = name.partition("~")
    rest, _, column = rest.partition("#")
    rest, _, split = rest.partition("@")
    path, _, config = rest.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or default_split, revision=revision or None)
    except Exception as error:  # of datasets, of the client and of file formats; they have no common type
        raise HfQuantError(
            f"dataset {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    column = column or next((known for known in ("text", "messages") if known in rows.column_names), "text")
    if column not in rows.column_names:
        raise HfQuantError(f"dataset {name}: no column {column!r}, there is {', '.join(rows.column_names)}")
    return list(rows[column])


def document(record: Any, tokenizer: Any = None) -> str:
    """One text: a string, the ``text`` of a record, or its ``messages`` (or a list of messages) as a chat.

    Args:
        record: Of a JSON file or a ``datasets`` set.
        tokenizer: Its chat template is applied to messages; where there is none, their contents are joined by newlines.

    Raises:
        ValueError: It has neither text nor messages.
    """
    if isinstance(record, Mapping):
        record = record["text"] if isinstance(record.get("text"), str) else record.get("messages")
    if isinstance(record, str):
        record.encode()  # halves of characters are no text
        return record
    if not isinstance(record, list) or not record:
        raise ValueError("neither text nor messages")
    if not all(isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in record):
        raise ValueError("a message must have a content that is a string")
    if getattr(tokenizer, "chat_template", None):
        return _without_bos(str(tokenizer.apply_chat_template(record, tokenize=False)), tokenizer)
    return "\n".join(message["content"] for message in record)


def _without_bos(text: str, tokenizer: Any) -> str:
    """Most chat templates write the first token out, and the tokenizer would add it once more."""
    first: str | None = getattr(tokenizer, "bos_token", None)
    if first is None or tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        return text
    return text.removeprefix(first)


def documents(name: str, rows: Sequence[Any], tokenizer: Any = None) -> str:
    """The texts of some rows of a ``datasets`` set, as one text; rows that are empty are left out.

    Raises:
        HfQuantError: A row is neither text nor messages; says which.
    """
    texts = []
    for number, row in enumerate(rows):
        try:
            texts.append(document(row, tokenizer) if row else "")
        except ValueError as error:
            raise HfQuantError(f"dataset {name}: row {number}: {error}") from None
    return SEPARATOR.join(text for text in texts if text.strip())


def read_dataset(name: str) -> str:
    """The documents of a ``datasets`` set, named as for `dataset_rows`, as one text."""
    return documents(name, dataset_rows(name))


def split(text: str) -> list[str]:
    """The documents of a text, those that are empty left out."""
    return [document.strip("\n") + "\n" for document in text.split(SEPARATOR) if document.strip()]


def halves(text: str) -> tuple[str, str]:
    """Its documents in two texts of about the same length, documents of every length in both."""
    documents = sorted(split(text), key=len, reverse=True)
    one, two = ([d for i, d in enumerate(documents) if i % 4 in pair] for pair in ((0, 3), (1, 2)))
    return SEPARATOR.join(one), SEPARATOR.join(two)


def windows(
    tokenizer: Any, text: str, context: int, max_tokens: int | None = None, stride: int | None = None
) -> Windows:
    """Cut ``text`` into windows of ``context`` tokens; documents follow one another, the last partial window is left out.

    Args:
        tokenizer: Of the base model.
        text: Documents separated by ``<|endoftext|>``.
        context: Tokens in a window.
        max_tokens: Score about that many at most, in windows spread evenly over the text, so that they come from as many
            documents as possible.
        stride: Tokens from one window to the next; ``context`` where it is None.

    Raises:
        HfQuantError: The text is shorter than one window, or a number makes no sense.
    """
    stride = context if stride is None else stride
    if context < 2:
        raise HfQuantError(f"context must be at least 2 tokens, got {context}")
    if not 1 <= stride <= context:
        raise HfQuantError(f"stride must be from 1 to the context of {context} tokens, got {stride}")
    pieces = [torch.tensor(tokenizer(d, verbose=False).input_ids, dtype=torch.int64) for d in split(text)]
    ids = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    if len(ids) < context:
        raise HfQuantError(f"the text has {len(ids)} tokens, fewer than one window of {context}")
    document = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor([len(p) for p in pieces]))
    found = (len(ids) - context) // stride + 1
    wanted = min(found, max(1, (max_tokens or len(ids)) // stride))
    chosen = torch.arange(wanted) * found // wanted
    at = chosen[:, None] * stride + torch.arange(context)
    scored = torch.ones(wanted, context - 1, dtype=torch.bool)
    scored[1:, : max(0, context - 1 - stride)] = False  # window 0 is always chosen, and nothing comes before it
    return Windows(ids[at], document[at], scored, stride)


def paragraphs(text: str) -> set[str]:
    """What tells whether two texts share content: hashes of their longer paragraphs, white space aside."""
    text = text.replace("\r\n", "\n")
    cleaned = (" ".join(part.split()) for document in split(text) for part in document.split("\n\n"))
    return {hashlib.sha256(part.encode()).hexdigest()[:16] for part in cleaned if len(part) >= PARAGRAPH}


def refuse_overlap(text: str, calibrated_on: Iterable[str]) -> None:
    """Raise if more than one in a hundred paragraphs of ``text`` were calibrated on.

    Args:
        text: To measure on.
        calibrated_on: `paragraphs` of the calibration text, as a recipe stores them.

    Raises:
        HfQuantError: Says how many.
    """
    own = paragraphs(text)
    shared = len(own & set(calibrated_on))
    if shared > len(own) / 100:
        raise HfQuantError(
            f"{shared} of {len(own)} paragraphs of the evaluation text were calibrated on: the numbers would flatter the "
            "model; measure on another text, or pass --allow-overlap"
        )
