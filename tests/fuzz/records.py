"""Spoilt records of what was done and measured: recipe.json, results.json and ladder.json, which people edit by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.entrances import command, enter
from tests.fuzz.mutate import encoded, spoil_json

CARDS = Path(__file__).parents[2] / "model_cards"
COMMANDS = {"card show": ["card", "show"], "report": ["report"]}


@cache
def _records(folder: Path) -> dict[str, Any]:
    facts = json.loads((folder / "facts.json").read_text())
    ladder = facts["results"].get("ladder", {}) | {"sensitivity": {"kl": {}}, "folder": "x"}
    return {"recipe": facts["recipe"], "results": facts["results"], "ladder": ladder}


def spoil_records(chance: Random, folder: Path) -> str:
    """Write records, one of them spoilt, into an empty folder; which card they are of."""
    card = chance.choice(sorted(path.parent for path in CARDS.glob("*/facts.json")))
    records = copy.deepcopy(_records(card))
    which = chance.choice(["recipe", "recipe", "results", "results", "ladder"])
    spoil_json(chance, records[which])
    for name, record in records.items():
        (folder / f"{name}.json").write_bytes(encoded(record))
    return f"{card.name} ({which})"


def faults(folder: Path) -> Iterator[str]:
    """Everything that goes wrong with one folder of records, a line each."""
    for name, words in COMMANDS.items():
        outcome = enter(name, folder, lambda words=words: command([*words, str(folder)]))  # type: ignore[misc]
        if outcome.fault:
            yield f"{name}: {outcome.fault}"
