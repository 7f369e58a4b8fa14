"""JSON from an untrusted source: without duplicate keys, and limited in the memory that it takes."""

from __future__ import annotations

import json
from typing import Any

from hf_quant.errors import CheckpointError, printable

MAX_BYTES = 100_000_000  # the limit of the safetensors library for a header
MAX_VALUES = 1_500_000  # enough for 200,000 tensors in one header; a value takes up to 250 bytes in Python


def parsed(raw: bytes, name: str, what: str = "file", *, values: int = MAX_VALUES) -> dict[str, Any]:
    """A JSON object without duplicate keys, of which readers would take either one.

    Args:
        raw: UTF-8 text.
        name: Name of the file, for messages.
        what: The part of the file that is read, for messages.
        values: Largest number of values, counted by commas and brackets before parsing.

    Raises:
        CheckpointError: It is not valid JSON, not an object, or too large.
    """
    count = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if count > values:
        raise CheckpointError(f"{name}: {what} holds about {count} values, the limit is {values}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique_pairs = dict(pairs)
        if len(unique_pairs) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{name}: key {shown(twice)} stands twice in the {what}")
        return unique_pairs

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: {what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: {what} must hold a JSON object, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value from an untrusted source, short and printable."""
    try:
        return printable(ascii(value), 100)
    except RecursionError:
        return "something nested deeply"
