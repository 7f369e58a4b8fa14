"""JSON from a stranger: no key twice, and never more of it than memory that was allowed for it."""

from __future__ import annotations

import json
from typing import Any

from hf_quant.errors import CheckpointError, printable

MAX_BYTES = 100_000_000  # the safetensors library allows a header as much
MAX_VALUES = 1_500_000  # of 200,000 tensors in one header; each value takes up to 250 bytes in Python


def parsed(raw: bytes, name: str, what: str = "file", *, values: int = MAX_VALUES) -> dict[str, Any]:
    """A JSON object in which no key stands twice: readers differ in which of the two they take.

    Args:
        raw: UTF-8 text.
        name: Of the file, for messages.
        what: Part of it that is read, for messages.
        values: How many values it may hold at most, counted by commas and brackets before anything is parsed.

    Raises:
        CheckpointError: It is not valid JSON, not an object, or holds too much.
    """
    count = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if count > values:
        raise CheckpointError(f"{name}: {what} holds about {count} values, the limit is {values}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{name}: key {shown(twice)} stands twice in the {what}")
        return made

    try:
        made = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: {what} is not valid JSON: {error}") from None
    if not isinstance(made, dict):
        raise CheckpointError(f"{name}: {what} must hold a JSON object, got {shown(made)}")
    return made


def shown(value: Any) -> str:
    """A stranger's value, short and printable."""
    try:
        return printable(ascii(value), 100)
    except RecursionError:
        return "something nested deeply"
