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
    """What ``model``, a folder or a Hub id, says of how it was made; empty where it says nothing.

    Raises:
        HfQuantError: Its recipe.json is damaged; names the field. Or the Hub has no such model.
    """
    from hf_quant.publish.facts import read_facts

    if (folder := _folder_of(model)) is None:
        return {}
    try:
        recipe = read_facts(folder, "recipe") or {}
        _check_blocks(recipe.get("blocks") or [])
    except HfQuantError as error:
        raise HfQuantError(f"{model}: {error}") from None
    return recipe


def _folder_of(model: str) -> Path | None:
    """Where the recipe of a model lies; None where a model on the Hub has none, or the Hub is not in reach."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    from hf_quant.jobs.headers import not_there

    try:
        return Path(hf_hub_download(model, RECIPE)).parent
    except EntryNotFoundError:
        return None
    except Exception as error:  # of the client and of its transport; they have no common type
        raise HfQuantError(not_there(model, error)) from None


def _check_blocks(blocks: list[dict[str, Any]]) -> None:
    """Refuse blocks without the errors of their layers."""
    for number, block in enumerate(blocks):
        errors = block.get("layers")
        if not isinstance(errors, dict) or not all(e is None or _is_error(e) for e in errors.values()):
            raise HfQuantError(f"{RECIPE}: blocks.{number}.layers: an object of layers and their errors was expected")


def _is_error(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 0


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
            raise HfQuantError(
                f"{model} was made from a folder called {base!r}, which is not known to be as it was: say where it is with --base"
            )
        return str(place), None
    if Path(base).is_dir():
        return str(base), None
    return str(base), source.get("revision") if base == source.get("model") else None


def why_not_its_base(model: str, recipe: Mapping[str, Any], base: str) -> str | None:
    """Why ``base`` is not known to be what ``model`` was made from; None if it is, or if nothing says what that was."""
    if not recipe:
        return f"{model} was compared with itself" if same_model(model, base) else None
    source, place = recipe["source"]["model"], recalled(Path(model)) if Path(model).is_dir() else None
    if place is not None and same_model(str(place), base):
        return None
    if not Path(base).is_dir():
        known = base == source
    else:  # a recipe with a folder's name, of which nothing is remembered
        known = place is None and source == Path(os.path.realpath(base)).name
    return None if known else f"{base} is not known to be {source}, which {model} was made from"


def refuse_itself(model: str, recipe: Mapping[str, Any], base: str) -> None:
    """Refuse a quantized model as its own base.

    Raises:
        HfQuantError: It is.
    """
    if recipe and same_model(model, base):
        source = recipe["source"]["model"]
        raise HfQuantError(f"--base {base}: is MODEL itself, beside which nothing is lost; it was made from {source}")


def same_model(one: str, two: str) -> bool:
    """Whether both name the same folder, or the same Hub id."""
    if Path(one).is_dir() and Path(two).is_dir():
        return os.path.realpath(one) == os.path.realpath(two)
    return one == two


def remember(folder: Path, base: str) -> None:
    """Keep where the base of ``folder`` lies, if it is a folder; on this machine alone, and only if the cache can be written."""
    if not Path(base).is_dir() or not (folder / RECIPE).is_file():
        return
    with suppress(OSError):
        file = _note(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps({"base": os.path.realpath(base), "recipe": _digest(folder), "files": _files(Path(base))}),
            encoding="utf-8",
        )


def recalled(folder: Path) -> Path | None:
    """Where the base of ``folder`` lies; None if that is not known, or no longer true."""
    try:
        note = json.loads(_note(folder).read_text(encoding="utf-8"))
        place = Path(note["base"])
        same = note["recipe"] == _digest(folder) and note["files"] == _files(place)
        return place if same and (place / "config.json").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(base: Path) -> str:
    """A digest of the config of a base, and of the sizes of its weights and the times when they were written."""
    digest = hashlib.sha256((base / "config.json").read_bytes())
    for file in sorted(base.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns} ".encode())
    return digest.hexdigest()


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / RECIPE).read_bytes()).hexdigest()


def _note(folder: Path) -> Path:
    from huggingface_hub.constants import HF_HOME

    name = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(HF_HOME) / "hf_quant" / "bases" / f"{name}.json"
