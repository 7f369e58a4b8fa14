"""The Triton kernels without a GPU: interpreted against float64, and compiled ahead of time for four kinds of GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(script: str, *args: str, interpret: bool) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | (
        {"TRITON_INTERPRET": "1"} if interpret else {}
    )
    done = subprocess.run([sys.executable, HERE / script, *args], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_interpreted_it_equals_float64() -> None:
    assert run("_interpreted.py", interpret=True) == "48 agree"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_ahead_of_time_without_spills(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or the compiler might not be asked
    rows = [json.loads(line) for line in run("_ahead_of_time.py", target, interpret=False).splitlines()]
    assert len(rows) == 12
    for row in rows:
        assert row["spills"] == 0 and (row["mma"] > 0 or "outliers" in row) and 0 < row["registers"] <= 255, row
