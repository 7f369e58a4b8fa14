"""Where the scripts leave what they measured."""

import json
import re
from pathlib import Path
from typing import Any

from hf_quant.bench.machine import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"


def write(name: str, record: Any, page: str) -> None:
    """``record`` as ``results/NAME.json``, and ``page``, which is for people, as ``results/NAME.md``.

    A table that another processor made stays: this one then lies beside it, as ``NAME.PROCESSOR``.
    """
    RESULTS.mkdir(exist_ok=True)
    stem = stem_for(RESULTS, name, cpu_name())
    (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{stem}.md").write_text(page.rstrip() + "\n")


def stem_for(folder: Path, name: str, cpu: str) -> str:
    """The name of the files for results of the processor ``cpu``."""
    file = folder / f"{name}.json"
    before = processor(json.loads(file.read_text())) if file.is_file() else None
    return name if before is None or before.startswith(cpu) else f"{name}.{slug(cpu)}"


def processor(record: Any) -> str | None:
    """The processor that a record names, at whatever depth it does."""
    if isinstance(record, list):
        return next(filter(None, map(processor, record)), None)
    if not isinstance(record, dict):
        return None
    here = record.get("cpu") or record.get("processor")
    return here if isinstance(here, str) else next(filter(None, map(processor, record.values())), None)


def slug(cpu: str) -> str:
    """``Intel(R) Xeon(R) Processor`` is ``intel-xeon``."""
    words = re.sub(r"\(\w+\)|@.*|\b(processor|cpu)\b", "", cpu, flags=re.IGNORECASE).lower().split()
    return "-".join(words) or "cpu"
