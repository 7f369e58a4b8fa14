"""recipe.json, results.json and ladder.json, which people may have edited: read, and validated against their schemas."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import CheckpointError, SchemeError, printable

KINDS = ("recipe", "results", "ladder")
LONGEST = 200  # characters of a message about one field


def read_facts(folder: Path, kind: str) -> dict[str, Any] | None:
    """One of the files that record how a model was made and measured; None if the folder does not have it.

    Args:
        folder: The folder of a model, or of a ladder.
        kind: One of `KINDS`.

    Raises:
        CheckpointError: It is damaged, or a field violates the schema; names the field.
    """
    path = Path(folder) / f"{kind}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(
            path.read_text(encoding="utf-8"), parse_int=_integer, parse_float=_number, parse_constant=_constant
        )
        json.dumps(
            record, ensure_ascii=False
        ).encode()  # a lone surrogate, as in "\\ud800", could not be written again
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: {_short(error)}") from None
    check_facts(record, kind)
    return dict(record)


def check_facts(record: Any, kind: str) -> None:
    """Validate a record against the schema of its ``kind``.

    Raises:
        CheckpointError: Names the field.
    """
    if not isinstance(record, dict):
        raise CheckpointError(f"{kind}.json: not an object")
    from jsonschema.exceptions import best_match

    if (error := best_match(_validator(kind).iter_errors(record))) is not None:
        where = ".".join(map(str, error.absolute_path))
        raise CheckpointError(f"{kind}.json: {_short(where)}{': ' if where else ''}{_short(error.message)}")
    for where, slug in _slugs(record, kind):
        try:
            QuantScheme.parse(slug)
        except SchemeError as error:
            raise CheckpointError(f"{kind}.json: {_short(where)}: {_short(error)}") from None
    costs: Mapping[str, list[float]] = (record.get("sensitivity") or {}).get("kl") or {}
    for group, values in costs.items():
        if len(values) != len(record["sensitivity"].get("bits", [])):
            raise CheckpointError(f"{kind}.json: sensitivity.kl.{_short(group)}: not one number for each of the bits")


def _slugs(record: Mapping[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    """Field and value of every scheme."""
    if kind == "recipe":
        yield "scheme", record["scheme"]
        for name, slug in record["schemes"].items():
            yield f"schemes.{name}", slug


@lru_cache
def _validator(kind: str) -> Any:
    from jsonschema import Draft202012Validator

    stem = "recipe" if kind == "recipe" else "results"
    schema = json.loads((Path(__file__).parent / "schemas" / f"{stem}.schema.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema if kind == stem else {"$ref": "#/$defs/walk", "$defs": schema["$defs"]})


def _integer(text: str) -> int:
    if len(text) > 18:
        raise ValueError(f"the number {text[:18]}... is too large")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is too large")
    return number


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _short(text: object) -> str:
    """Text from an untrusted source, short and printable."""
    return printable(str(text), LONGEST, lines=False)
