"""results.json: what was measured of the weights in a folder, added to by several commands."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOCKED = 60  # seconds to wait for another process that adds to the same results.json


def store_results(folder: Path, record: dict[str, Any], tell: Callable[[str], None] = lambda _: None) -> None:
    """Add what was measured to results.json, if ``folder`` is one; what was measured on other weights goes.

    Others may add to it at the same time. A quality measured on less of the same kind than the one stored does not replace it.

    Args:
        folder: Of the model.
        record: Fields of results.json.
        tell: Told if something is not stored.
    """
    from filelock import FileLock

    from hf_quant.disk.atomic import make_folder, write_json
    from hf_quant.disk.digests import measured_files, same_files

    if not folder.is_dir():
        return
    path, files, lock = folder / "results.json", measured_files(folder), _lock_of(folder)
    make_folder(lock.parent)
    with FileLock(lock, timeout=LOCKED):
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"files": files}
        if not isinstance(known, dict) or "files" not in known:
            tell(f"{path}: was not written by hf-quant, so it is left as it is, and nothing is stored")
            return
        if not same_files(known["files"], files):
            known = {}
        write_json(path, known | _better_founded(known, record, tell) | {"files": files})


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
