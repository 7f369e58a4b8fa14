"""Text as windows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant.data.chat import Chat
from hf_quant.errors import HfQuantError

BUNDLED = Path(__file__).parent / "bundled" / "heldout.txt"  # Python's documentation; its licence lies beside it
SEPARATOR = "<|endoftext|>"
PARAGRAPH = 200  # characters; shorter paragraphs (headings, licence lines) occur in many texts
RECORD = 40  # characters of a row of a file or data set; shorter ones (a greeting) occur in many
Text = str | Sequence[str]  # documents separated by `SEPARATOR`, or a list of them


@dataclass(frozen=True)
class Windows:
    """Tokens to measure on.

    Attributes:
        ids: int64 ``[W, T]``.
        document: int64 ``[W, T]``, the number of the document that each token comes from.
        scored: bool ``[W, T - 1]``, whether the prediction of token t + 1 counts; False for the overlap of windows.
        stride: Tokens from one window to the next.
    """

    ids: Tensor
    document: Tensor
    scored: Tensor
    stride: int

    @property
    def inside(self) -> Tensor:
        """bool ``[W, T - 1]``: whether token t + 1 belongs to the document of token t."""
        return self.document[:, 1:] == self.document[:, :-1]

    @property
    def context(self) -> int:
        """Tokens in a window."""
        return self.ids.shape[1]

    @property
    def continued(self) -> Tensor:
        """int64, the tokens whose prediction counts and that continue a document."""
        return self.ids[:, 1:][self.scored & self.inside]

    @property
    def sources(self) -> Tensor:
        """int64 ``[P]``, the document of each token whose prediction counts."""
        return self.document[:, 1:][self.scored]

    @property
    def sha256(self) -> str:
        """Identifies the tokens and which of them are scored."""
        digest = hashlib.sha256(f"{tuple(self.ids.shape)} {self.stride} ".encode())
        digest.update(self.ids.numpy().tobytes() + self.scored.numpy().tobytes())
        return digest.hexdigest()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        HfQuantError: It is not UTF-8; names the byte.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HfQuantError(f"{path.name}: not UTF-8 at byte {error.start}") from None


def dataset_rows(name: str, default_split: str = "test") -> list[Any]:
    """One column of a data set, loaded by ``datasets``.

    Args:
        name: ``ID[:CONFIG][@SPLIT][#COLUMN][~REVISION]``; the default column is ``text``, or else ``messages``.
        default_split: The split if ``name`` has none.

    Raises:
        HfQuantError: ``datasets`` is not installed, or there is no such data set or column.
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


def record_texts(record: Any, chat: Chat) -> list[str]:
    """The documents of a record: a string, its ``text``, or its ``messages`` (or a list of messages) as a chat.

    A text may hold several, separated by ``<|endoftext|>``. A chat is one, whatever its template writes after each turn.

    Args:
        record: From a JSON file or a data set.
        chat: Renders messages.

    Raises:
        ValueError: It has neither text nor messages.
    """
    if isinstance(record, Mapping):
        record = record["text"] if isinstance(record.get("text"), str) else record.get("messages")
    if isinstance(record, str):
        record.encode()  # halves of characters are no text
        return split(record)
    if not isinstance(record, list) or not record:
        raise ValueError("neither text nor messages")
    if not all(isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in record):
        raise ValueError("a message must have a content that is a string")
    return [chat.text_of(record)]


def read_documents(path: Path, chat: Chat) -> Text:
    """The text of a UTF-8 file, or the documents of a JSONL file with ``text`` or ``messages`` in each line.

    Raises:
        HfQuantError: It is not UTF-8, or a line is malformed; names the byte or the line.
    """
    if path.suffix != ".jsonl":
        return read_text(path)
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            texts += record_texts(json.loads(line), chat)
        except (ValueError, TypeError, KeyError) as error:
            raise HfQuantError(f"{path.name}: line {number}: {error}") from None
        except RecursionError:
            raise HfQuantError(f"{path.name}: line {number}: nested too deeply") from None
    return texts


def documents(name: str, rows: Sequence[Any], chat: Chat) -> list[str]:
    """The documents in some rows of a data set; empty rows are left out.

    Raises:
        HfQuantError: A row is neither text nor messages; names the row.
    """
    texts = []
    for number, row in enumerate(rows):
        try:
            texts += record_texts(row, chat) if row else []
        except ValueError as error:
            raise HfQuantError(f"dataset {name}: row {number}: {error}") from None
    return texts


def split(text: Text) -> list[str]:
    """The documents of a text, without empty ones."""
    if not isinstance(text, str):
        return [document for document in text if document.strip()]
    return [document.strip("\n") + "\n" for document in text.split(SEPARATOR) if document.strip()]


def halves(text: Text) -> tuple[Text, Text]:
    """Its documents divided into two texts of about the same length, both with documents of every length."""
    documents = sorted(split(text), key=len, reverse=True)
    one, two = ([d for i, d in enumerate(documents) if i % 4 in pair] for pair in ((0, 3), (1, 2)))
    return one, two


def windows(
    tokenizer: Any, text: Text, context: int, max_tokens: int | None = None, stride: int | None = None
) -> Windows:
    """Cut ``text`` into windows of ``context`` tokens. Documents follow one another; an incomplete last window is dropped.

    Args:
        tokenizer: Of the base model.
        text: Documents.
        context: Tokens in a window.
        max_tokens: About the number of tokens to score, in windows spread evenly over the text, so that they come from as many
            documents as possible.
        stride: Tokens from one window to the next; None for ``context``.

    Raises:
        HfQuantError: The text is shorter than one window, or a number is out of range.
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
    available = (len(ids) - context) // stride + 1
    count = min(available, max(1, (max_tokens or len(ids)) // stride))
    chosen = torch.arange(count) * available // count
    positions = chosen[:, None] * stride + torch.arange(context)
    scored = torch.ones(count, context - 1, dtype=torch.bool)
    scored[1:, : max(0, context - 1 - stride)] = False  # the first window overlaps with none
    return Windows(ids[positions], document[positions], scored, stride)


def words(text: Text) -> list[str]:
    """A text without its white space."""
    return " ".join(split(text)).split()


def paragraphs(text: Text) -> set[str]:
    """Hashes of the longer paragraphs of a text, white space aside: two texts with common hashes share content.

    Paragraphs are set apart by an empty line, or are lines of their own. A record, such as a short conversation, counts as a whole.
    """
    blocks = [part for document in split(text) for part in document.replace("\r\n", "\n").split("\n\n")]
    parts = (part for block in blocks for part in (block, *block.split("\n")))
    hashes = _hashes(parts, PARAGRAPH)
    return hashes if isinstance(text, str) else hashes | _hashes(text, RECORD)


def _hashes(parts: Iterable[str], shortest: int) -> set[str]:
    cleaned = (" ".join(part.split()) for part in parts)
    return {hashlib.sha256(part.encode()).hexdigest()[:16] for part in cleaned if len(part) >= shortest}


def refuse_overlap(text: Text, calibrated_on: Iterable[str]) -> None:
    """Refuse a text of which more than one in a hundred paragraphs were calibrated on.

    Args:
        text: The text to measure on.
        calibrated_on: `paragraphs` of the calibration text, as a recipe stores them.

    Raises:
        HfQuantError: Names the number of shared paragraphs.
    """
    refuse_shared(paragraphs(text), calibrated_on, "paragraphs", "evaluation text")


def refuse_shared(hashes: AbstractSet[str], calibrated_on: Iterable[str], parts: str, what: str) -> None:
    """Refuse what shares more than one in a hundred of its ``hashes`` with what was calibrated on.

    Args:
        hashes: Of the parts of what is to be measured on.
        calibrated_on: Hashes of the parts that were calibrated on.
        parts: What the parts are called.
        what: What they are parts of.

    Raises:
        HfQuantError: Names the number of shared parts.
    """
    shared = len(hashes & set(calibrated_on))
    if shared > len(hashes) / 100:
        raise HfQuantError(
            f"{shared} of {len(hashes)} {parts} of the {what} also occur in the calibration or training data: the numbers "
            f"would flatter the model; measure on {'another text' if parts == 'paragraphs' else 'others'}, or pass --allow-overlap"
        )
