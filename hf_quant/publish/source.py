"""Facts about a base model from the Hub: name, licence, gate. A copy has to state the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from hf_quant.disk.atomic import write_bytes
from hf_quant.disk.paths import inside
from hf_quant.errors import CheckpointError, PushError
from hf_quant.publish import file_kinds

T = TypeVar("T")
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
HEAD = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def metadata(card: str) -> dict[str, Any]:
    """The YAML at the top of a card; empty if there is none, or it is not a mapping."""
    match = HEAD.match(card)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def describe(model: str, revision: str | None = None, api: HfApi | None = None) -> dict[str, Any]:
    """The base for ``source`` in recipe.json: its id as the Hub spells it, commit, and inherited fields of the card.

    Args:
        model: Folder or Hub id.
        revision: Commit, branch or tag of a Hub model.
        api: The client to ask.

    Raises:
        PushError: The Hub has no such model, or does not answer.
    """
    if Path(model).is_dir():
        card = Path(model) / "README.md"
        readable = card.is_file() and _outside(Path(model), card.name) is None
        text = card.read_text(encoding="utf-8", errors="replace") if readable else ""
        return {"model": Path(model).resolve().name, "revision": None} | _inherited(metadata(text))
    at = f" at {revision}" if revision else ""
    info = _asked(f"the base {model}{at}", lambda: (api or HfApi()).model_info(model, revision=revision))
    card_data: Any = info.card_data  # its methods are not annotated
    description = {"model": info.id, "revision": info.sha} | _inherited(card_data.to_dict() if card_data else {})
    return description | ({"gated": info.gated} if info.gated else {})


def _asked(what: str, ask: Callable[[], T]) -> T:
    """The Hub's answer; errors omit the request, which contains the token."""
    try:
        return ask()
    except (RepositoryNotFoundError, RevisionNotFoundError):
        reason = "is not on the Hub, or the token may not see it"
    except Exception as error:  # the client passes on any error of its transport
        reason = f"cannot be read now: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    raise PushError(f"{what} {reason}")


def _inherited(card: Mapping[str, Any]) -> dict[str, Any]:
    """Only harmless fields, since the card may come from an untrusted source."""
    inherited = {key: card[key] for key in card if key in INHERITED or str(key).startswith("extra_gated_")}
    plain: dict[str, Any] = json.loads(json.dumps(inherited, default=str))  # YAML knows dates, recipe.json does not
    return {key: value for key, value in sorted(plain.items()) if value is not None}


def model_type(model: str, api: HfApi) -> str | None:
    """``model_type`` of a model on the Hub, from its config.json; None if it has none."""
    config = _asked(f"the base {model}", lambda: api.model_info(model)).config or {}
    return config.get("model_type")


def copy_notices(
    model: str, revision: str | None, folder: Path, say: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Copy licence texts and notices of the base into ``folder``, as licences require; returns their names.

    Args:
        model: Folder or Hub id.
        revision: Commit, branch or tag of a Hub model.
        folder: Where to copy them; existing files stay.
        say: Receives messages about files that are left out.

    Raises:
        PushError: The Hub has no such model, or does not answer.
    """
    files = notices(model, revision, say=say)
    for name, data in files.items():
        if not (folder / name).exists():
            write_bytes(folder / name, data)
    return list(files)


def notices(
    model: str, revision: str | None, api: HfApi | None = None, say: Callable[[str], None] = lambda line: None
) -> dict[str, bytes]:
    """Name and content of the licence texts and notices at the top of the base's folder; arguments as in `copy_notices`."""
    if Path(model).is_dir():
        paths = {file.name: file for file in sorted(Path(model).iterdir()) if _wanted(file.name) and file.is_file()}
    else:
        client = api or HfApi()
        listed = _asked(f"the base {model}", lambda: client.model_info(model, revision=revision)).siblings or []
        get = partial(client.hf_hub_download, model, revision=revision)
        paths = {
            name: Path(_asked(f"{name} of {model}", partial(get, name)))
            for name in sorted(file.rfilename for file in listed) if _wanted(name)
        }  # fmt: skip
    contents = {}
    for name, path in paths.items():
        if Path(model).is_dir() and (refusal := _outside(Path(model), name)):
            say(f"{name}: {refusal}, so it is not copied")
            continue
        data = path.read_bytes()
        if (refusal := file_kinds.why_not(name, data)) is not None:
            say(f"{name} of {model}: {refusal}, so it is not copied")
            continue
        contents[name] = data
    return contents


def _wanted(name: str) -> bool:
    return "/" not in name and file_kinds.is_notice(name)


def _outside(folder: Path, name: str) -> str | None:
    """Why a file of a local base is not read: it is a link to a place outside of the folder."""
    try:
        inside(folder, name)
    except CheckpointError:
        return "a link that leaves the folder of the model"
    return None
