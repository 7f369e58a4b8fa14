"""results.json: what was measured of the weights in a folder, added to by several commands."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_quant.errors import HfQuantError
from hf_quant.jobs.base import why_not_its_base
from hf_quant.jobs.progress import Important

RESULTS = "results.json"
LOCKED = 60  # seconds to wait for another process that adds to the same results.json


def store_beside_base(
    model: str, recipe: Mapping[str, Any], base: str | None, record: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """`store_results` of what was measured beside ``base``, if that is what ``model`` was made from; else say that it is not.

    Args:
        model: A folder; nothing is stored of a Hub id.
        recipe: Its recipe; empty if it has none.
        base: None for what was measured of ``model`` alone.
        record: Fields of results.json.
        tell: As for `store_results`.
    """
    if not Path(model).is_dir():
        return
    if base is not None and (reason := why_not_its_base(model, recipe, base)) is not None:
        tell(Important(f"{reason}: nothing is stored in results.json"))
    else:
        store_results(Path(model), record, tell)


def store_results(folder: Path, record: dict[str, Any], tell: Callable[[str], None] = lambda _: None) -> None:
    """Add what was measured to results.json, if ``folder`` is one; what was measured on other weights goes.

    Others may add to it at the same time. A quality measured on less of the same kind than the one stored does not replace it.

    Args:
        folder: Of the model.
        record: Fields of results.json.
        tell: Told if something is not stored, as where the folder cannot be written.
    """
    from filelock import FileLock

    from hf_quant.disk.atomic import make_folder

    if not folder.is_dir():
        return
    try:
        lock = _lock_of(folder)
        make_folder(lock.parent)
        with FileLock(lock, timeout=LOCKED):
            _add(folder, record, tell)
    except (OSError, HfQuantError) as error:  # what was measured is worth more than where it is kept
        tell(Important(f"{folder / RESULTS}: nothing is stored: {error}"))


def check_results(folder: Path) -> None:
    """Refuse a results.json that nothing could be added to, before anything is measured.

    Raises:
        HfQuantError: It is damaged; names the field.
    """
    if (folder / RESULTS).is_file():
        _known(folder)


def _known(folder: Path) -> dict[str, Any] | None:
    """What results.json holds; None if another program wrote it."""
    from hf_quant.publish.facts import read_facts

    try:
        plain = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        if not isinstance(plain, dict) or "files" not in plain:
            return None
        return read_facts(folder, "results")
    except HfQuantError as error:  # names the file
        raise HfQuantError(f"{folder}: {error}; mend it, or move it away") from None
    except (ValueError, RecursionError) as error:
        raise HfQuantError(f"{folder}: {RESULTS}: {error}; mend it, or move it away") from None


def _add(folder: Path, record: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Write what is known already and ``record`` together."""
    from hf_quant.disk.atomic import write_json
    from hf_quant.disk.digests import measured_files, same_files

    path, files = folder / RESULTS, measured_files(folder)
    known = _known(folder) if path.is_file() else {"files": files}
    if known is None:
        tell(f"{path}: was not written by hf-quant, so it is left as it is, and nothing is stored")
        return
    if not same_files(known["files"], files):
        known = {}
    added = known | _better_founded(known, record, tell)
    if "quality" in record and "gate" not in record and "gate" in added:
        _judge_again(added, tell)
    write_json(path, added | {"files": files})


def _judge_again(results: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Hold the quality of ``results`` against the limits that an earlier one was held against."""
    from hf_quant.evaluation.gate import Budget
    from hf_quant.evaluation.results import Quality

    before = results.pop("gate")
    try:
        results["gate"] = Budget(**before["budget"]).verdict(Quality.from_dict(results["quality"]))
    except HfQuantError as error:
        tell(f"results.json: the gate is left out: {error}")
        return
    if results["gate"]["passed"] != before["passed"]:
        limits = ", ".join(f"{name} {limit:g}" for name, limit in before["budget"].items())
        now = "is inside" if results["gate"]["passed"] else "is out of"
        tell(f"results.json: with these numbers the model {now} the budget that it was held against before ({limits})")


def _lock_of(folder: Path) -> Path:
    """Not in the folder itself, which may be published."""
    from huggingface_hub.constants import HF_HOME

    name = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(HF_HOME) / "hf_quant" / "locks" / f"{name}.lock"


def _better_founded(known: dict[str, Any], record: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """``record`` with the quality that is stored already, if that has intervals where this has none, or more tokens."""
    from hf_quant.evaluation.gate import Budget
    from hf_quant.evaluation.results import Quality

    old, new = known.get("quality"), record.get("quality")
    if old is None or new is None or old["kind"] != new["kind"] or old.get("inputs", []) != new.get("inputs", []):
        return record
    units = "samples" if new.get("inputs") else "documents"
    if (old["resampled"] == units, old["tokens"]) <= (new["resampled"] == units, new["tokens"]):
        return record
    combined = record | {"quality": old}
    if "gate" in record:
        combined["gate"] = Budget(**record["gate"]["budget"]).verdict(Quality.from_dict(old))
    tell(
        f"results.json keeps the quality measured on {_extent(old)}, which says more than these {_extent(new)}"
        + (", and judges that by the gate" if "gate" in record else "")
    )
    return combined


def _extent(quality: dict[str, Any]) -> str:
    from hf_quant.evaluation.results import amount_of

    return amount_of(quality) + ("" if quality.get("inputs") else f" of {quality['documents']} documents")
