"""Where the scripts leave what they measured."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def write(name: str, record: Any, page: str) -> None:
    """``record`` as ``results/NAME.json``, and ``page``, which is for people, as ``results/NAME.md``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(page.rstrip() + "\n")
