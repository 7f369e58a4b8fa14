"""Every method, transform and format on every awkward width: the whole matrix of which the tests take a sample.

    python benchmarks/widths.py [--width 576 ...] [--rows 33 ...]

Prints what failed, and how many cases of each kind were right. All of it takes some hours on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from hf_quant import _plugins
from tests.widths import ROWS, WIDTHS, cases, check_formats, check_method, check_transform


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    asked = parser.parse_args()
    torch.manual_seed(0)
    right: Counter[str] = Counter()
    wrong = 0
    for width in asked.width:
        start = time.monotonic()
        for case in cases((width,), tuple(asked.rows)):
            for kind in ("methods", "transforms"):
                for name in _plugins.names(kind):
                    if name == "drift":  # which changes the function on purpose
                        continue
                    try:
                        if kind == "methods":
                            right["round trips through a format"] += check_formats(check_method(name, case))
                        else:
                            check_transform(name, case)
                        right[f"{kind}: {name}"] += 1
                    except Exception as error:  # whatever it is, the rest is looked at too
                        wrong += 1
                        print(f"{name} {case}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        print(f"width {width}: {dict(right)}, {wrong} failed, {time.monotonic() - start:.0f} s", flush=True)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
