"""The Triton kernels without a GPU: interpreted against float64, and compiled ahead of time for five kinds of GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
STATIC = HERE.parents[1] / "benchmarks" / "gpu_static.py"


def run(*command: str, **more: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done.stdout


def test_interpreted_it_equals_float64() -> None:
    """In a process of its own, since TRITON_INTERPRET must be set before triton is imported."""
    files = [str(HERE / name) for name in ("test_wna16.py", "test_outliers.py", "test_experts.py", "test_padding.py")]
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert re.search(r"\d{2,} passed", said) and "skipped" not in said, said


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_machine_code_keeps_its_limits(target: str, tmp_path: Path) -> None:
    """Registers, spills, shared memory, matrix instructions, wide loads, instructions per weight; see the script."""
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}  # or the compiler might not be asked
    rows = [json.loads(line) for line in run(str(STATIC), "--quick", "--target", target, **cache).splitlines()]
    assert len(rows) == (25 if target == "sm_90" else 4) and not any(row["wrong"] for row in rows)
    assert all(row["registers"] > 0 for row in rows)


def test_one_row_is_multiplied_by_the_kernel_of_many() -> None:
    """A constant for M, as Triton makes of 1, would not compile: it has no dtype to widen."""
    from hf_quant.kernels._triton.wna16 import wna16_kernel

    assert [p.name for p in wna16_kernel.params if p.do_not_specialize] == ["M"]


def test_results_in_the_repository_are_of_these_tables() -> None:
    """Every tile of every table was compiled by the script whose results are committed, and none broke a limit."""
    from hf_quant.kernels._triton.tiles import tables

    rows = json.loads((STATIC.parent / "results" / "gpu_static.json").read_text())["rows"]
    compiled = {(row["target"], tuple(row["tile"])) for row in rows if "tile" in row}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for tile in tables()[target]["tiles"].values():
            assert (target, tuple(tile[:4])) in compiled
    assert not any(row["wrong"] for row in rows)
