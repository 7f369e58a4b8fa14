"""The model that a quantized one was made from: named by its recipe, or remembered on this machine.

A recipe is published with its model, so it names a base on the Hub, or only the name of a local folder. Where that folder
is, is kept beside the caches of this machine, and found again as long as neither the folder nor the recipe has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_quant.errors import HfQuantError

RECIPE = "recipe.json"


def recipe_of(model: str) -> dict[str, Any]:
    """What ``model`` says of how it was made; empty where it says nothing.

    Raises:
        HfQuantError: Its recipe.json is none.
    """
    file = Path(model) / RECIPE
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HfQuantError(f"{file}: {error}") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("source", {}), dict):
        raise HfQuantError(f"{file}: is not a recipe: an object with the object source was expected")
    return stored


def base_of(model: str, recipe: Mapping[str, Any], named: str | None) -> tuple[str, str | None]:
    """The base that is ``named``, or else the one of the recipe; and its commit, where the recipe knows it.

    Raises:
        HfQuantError: It is not known, or was a folder that is not where it was; says how to name it.
    """
    source = recipe.get("source", {})
    base = named or source.get("model")
    if base is None:
        raise HfQuantError(f"{model} does not say what it was made from: name it with --base")
    if named is None and "/" not in base:
        if (place := recalled(Path(model))) is None:
            raise HfQuantError(f"{model} was made from a folder called {base!r}: say where it is with --base")
        return str(place), None
    if Path(base).is_dir():
        return str(base), None
    return str(base), source.get("revision") if base == source.get("model") else None


def remember(folder: Path, base: str) -> None:
    """Keep where the base of ``folder`` lies, if it is a folder; on this machine alone, and only if the cache can be written."""
    if not Path(base).is_dir() or not (folder / RECIPE).is_file():
        return
    with suppress(OSError):
        file = _note(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"base": os.path.realpath(base), "recipe": _digest(folder)}), encoding="utf-8")


def recalled(folder: Path) -> Path | None:
    """Where the base of ``folder`` lies; None if that is not known, or no longer true."""
    try:
        note = json.loads(_note(folder).read_text(encoding="utf-8"))
        place = Path(note["base"])
        return place if note["recipe"] == _digest(folder) and (place / "config.json").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / RECIPE).read_bytes()).hexdigest()


def _note(folder: Path) -> Path:
    from huggingface_hub.constants import HF_HOME

    name = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(HF_HOME) / "hf_quant" / "bases" / f"{name}.json"
