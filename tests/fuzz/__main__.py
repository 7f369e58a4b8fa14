"""``python -m tests.fuzz FIRST LAST [OUT.jsonl]``: the cases from FIRST to before LAST; exit code 1 if any is at fault."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.fuzz.run import report

if __name__ == "__main__":
    first, last, *out = sys.argv[1:]
    sys.exit(bool(report(int(first), int(last), Path(out[0]) if out else None)))
