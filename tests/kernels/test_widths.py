"""Widths that models have and kernels are not made for: a part of ``benchmarks/kernel_widths.py``."""

import importlib.util
import random
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_widths.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no benchmarks beside the tests")


def test_every_backend_on_every_width_and_height() -> None:
    spec = importlib.util.spec_from_file_location("kernel_widths", SCRIPT)
    assert spec is not None and spec.loader is not None
    widths = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(widths)
    some, ran = widths.cases(), {}
    random.Random(0).shuffle(some)
    for case in some:
        name, _, n, k, _ = case
        kinds = [(name, "N", n), (name, "K", k)]
        if all(kind in ran for kind in kinds) or n * k > 1 << 19:
            continue
        found = widths.backend_for(case)
        if found is not None:
            assert widths.error(*found) < widths.limit(case), case
            ran |= dict.fromkeys(kinds)
    backends = {name for name, _, _ in ran}
    assert {"dequant", "codebook", "reference"} <= backends
    for name in backends - {"cpu_int4"}:  # which wants rows by the sixteen
        assert len([kind for kind in ran if kind[0] == name]) == len(widths.WIDTHS) + len(widths.HEIGHTS), name
