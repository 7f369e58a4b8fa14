"""Calibration data in the forms that people have them, as one of those that `data.calibration` reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant.data.batches import is_record
from hf_quant.errors import HfQuantError

TEXTS = ("text", "messages")  # columns of a table of texts
NAME = 255  # characters of the longest name that a file may have
MANY = 65536  # rows are taken at most of what has no length and may never end
TAKEN = (
    "a text or JSONL file, the name of a data set, a list of texts, rows with text or messages, token ids [S, T], "
    "or batches of the model's inputs"
)


def as_source(given: Any) -> Any:
    """Calibration data as None, a name, a path, token ids ``[S, T]``, or a list of texts, of records of text or of batches.

    Args:
        given: One of these; or what yields it, arrays and lists of token ids, or a whole table: a mapping of names to columns.
            Of what has no length, such as a data set that is streamed, the first rows are taken.

    Raises:
        HfQuantError: It is something else; says what is taken.
    """
    if isinstance(given, str) and ("\n" in given or any(len(part) > NAME for part in given.split("/"))):
        raise HfQuantError("calibration: one string names a file or a data set, and a text goes into a list: [text]")
    if given is None or isinstance(given, str | Path | Tensor):
        return given
    if isinstance(given, Mapping):
        return as_source(_rows(given))
    if not isinstance(given, Iterable):
        raise HfQuantError(f"calibration: {type(given).__name__} is none of what is taken: {TAKEN}")
    rows = _listed(given)
    if not rows or isinstance(rows[0], str | Mapping) or _is_chat(rows[0]):
        return rows
    return _tokens([_ids(number, row) for number, row in enumerate(rows)])


def _listed(given: Iterable[Any]) -> list[Any]:
    try:
        len(given)  # type: ignore[arg-type]
    except TypeError:  # also of a loader whose data set has none
        return list(islice(given, MANY))
    return list(given)


def _rows(table: Mapping[Any, Any]) -> list[Any]:
    """The samples of a table, such as a tokenizer returns."""
    columns = {name: column for name, column in table.items() if column is not None}
    name = next((name for name in TEXTS if name in columns), None)
    if name is not None and is_record(columns):
        return [columns] if isinstance(columns[name], str) or _is_chat(columns[name]) else list(columns[name])
    if columns.keys() <= {"input_ids"}:
        return list(columns.get("input_ids", []))
    lengths = {str(name): len(column) if hasattr(column, "__len__") else None for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise HfQuantError(
            f"calibration: the columns of a table must have one value for each sample, and have {lengths}; or pass a list: {TAKEN}"
        )
    if "input_ids" in columns and torch.as_tensor(columns["input_ids"][0]).ndim == 0:
        return [columns]
    return [{n: column[i : i + 1] for n, column in columns.items()} for i in range(next(iter(lengths.values())) or 0)]


def _is_chat(row: Any) -> bool:
    return isinstance(row, Sequence) and len(row) > 0 and isinstance(row[0], Mapping)


def _ids(number: int, row: Any) -> Tensor:
    """Token ids, or a batch of them."""
    try:
        return torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError):
        raise HfQuantError(
            f"calibration: row {number} is {type(row).__name__}, which is none of what is taken: {TAKEN}"
        ) from None


def _tokens(rows: list[Tensor]) -> Any:
    """Token ids as one tensor, or as batches where some sequences are longer than others."""
    if any(row.ndim not in (1, 2) for row in rows):
        raise HfQuantError(
            f"calibration: token ids must be whole numbers [S, T]; a row has shape {list(rows[0].shape)}"
        )
    batches = [row[None] if row.ndim == 1 else row for row in rows]
    if len({batch.shape[1:] for batch in batches}) == 1:
        return torch.cat(batches)
    return [{"input_ids": batch} for batch in batches]
