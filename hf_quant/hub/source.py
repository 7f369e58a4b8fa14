"""What a base model says about itself: name, licence, gate. A copy of it has to say the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from hf_quant.errors import PushError

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
NOTICE = re.compile(r"(licen[cs]e|notice|copying|use_policy)[\w.-]*", re.IGNORECASE)
_HEAD = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def metadata(card: str) -> dict[str, Any]:
    """The YAML at the head of a card; empty if there is none, or it is not a mapping."""
    match = _HEAD.match(card)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def describe(model: str, revision: str | None = None, api: HfApi | None = None) -> dict[str, Any]:
    """For ``source`` in recipe.json: id as the Hub spells it, commit, and what a card inherits.

    Args:
        model: Folder or Hub id.
        revision: Of a Hub model.
        api: The client to ask.

    Raises:
        PushError: The Hub has no such model.
    """
    if Path(model).is_dir():
        card = Path(model) / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        return {"model": Path(model).resolve().name, "revision": None} | _inherited(metadata(text))
    found = None
    with suppress(RepositoryNotFoundError, RevisionNotFoundError):
        found = (api or HfApi()).model_info(model, revision=revision)
    if found is None:
        at = f" at {revision}" if revision else ""
        raise PushError(f"the base {model}{at} is not on the Hub, or the token may not see it")
    card_data: Any = found.card_data  # its methods have no annotations
    made = {"model": found.id, "revision": found.sha} | _inherited(card_data.to_dict() if card_data else {})
    return made | ({"gated": found.gated} if found.gated else {})


def _inherited(card: Mapping[str, Any]) -> dict[str, Any]:
    """Only what is known to be harmless: a stranger's card may hold anything."""
    found = {key: card[key] for key in card if key in INHERITED or str(key).startswith("extra_gated_")}
    made: dict[str, Any] = json.loads(json.dumps(found, default=str))  # YAML knows dates, recipe.json does not
    return {key: value for key, value in sorted(made.items()) if value is not None}


def copy_notices(model: str, revision: str | None, folder: Path, api: HfApi | None = None) -> list[str]:
    """Copy licence texts and notices of the base into ``folder``, which must carry them on; returns their names."""
    if Path(model).is_dir():
        names = [path.name for path in sorted(Path(model).iterdir()) if path.is_file() and NOTICE.fullmatch(path.name)]
        found = {name: Path(model) / name for name in names}
    else:
        client = api or HfApi()
        listed = client.model_info(model, revision=revision).siblings or []
        names = sorted(each.rfilename for each in listed if NOTICE.fullmatch(each.rfilename))
        found = {name: Path(client.hf_hub_download(model, name, revision=revision)) for name in names}
    for name, path in found.items():
        if not (folder / name).exists():
            shutil.copyfile(path, folder / name)
    return list(found)
