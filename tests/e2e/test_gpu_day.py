"""The day with a GPU, without one: stages run with tiny shapes, and a stage that is cut loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_day

    return gpu_day


def test_a_dry_run_of_stages(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_day.py"), str(tmp_path), "--dry-run", "--stages"]
    how: dict[str, Any] = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": str(BENCHMARKS)}}
    done = subprocess.run([*command, "linear,tiles,experts"], check=False, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    states = {row["stage"]: row["state"] for row in rows if "state" in row}
    assert states == {"linear": "done", "tiles": "done", "experts": "done"}
    assert sum("error" in row for row in rows) > 100 and not any("failed" in row for row in rows)
    assert "## experts" in (tmp_path / "report.md").read_text()
    done = subprocess.run([*command, "linaer"], check=False, **how)
    assert done.returncode == 2 and "no such stage: linaer; there are correctness, linear" in done.stderr


def test_a_stage_that_is_cut_keeps_its_rows(day: Any, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import argparse, os, subprocess, sys, time\nfrom pathlib import Path\nfrom _gpu import Rows\n"
        "a = argparse.ArgumentParser(); a.add_argument('--rows', type=Path)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "Rows('slow', a.parse_args().rows).add(child=child.pid)\ntime.sleep(600)\n"
    )
    state = day.run("slow", day.Stage((str(script),), 600), tmp_path, False, 15)
    assert state["state"] == "cut after 15 s" and state["seconds"] < 60
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"stage": "slow", "cut in the mid')
    (row,) = day.rows_of(tmp_path)
    assert row["stage"] == "slow"
    status = Path(f"/proc/{row['child']}/status")
    assert not status.exists() or "zombie" in status.read_text(), "what a stage started ends with it"
    assert "| slow |" in day.page([row | {"state": "cut"}])


def test_a_stage_that_fails_is_named(day: Any, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(3)\n")
    assert day.run("broken", day.Stage((str(script),), 60), tmp_path, False, 60)["state"] == "ended with 3"
    absent = day.Stage((str(script),), 60, ("no-such-tool",))
    assert day.run("absent", absent, tmp_path, False, 60)["state"] == "left out: no-such-tool is not installed"


def test_every_stage_is_a_program(day: Any) -> None:
    for dry_run in (True, False):
        for stage in day.stages(dry_run).values():
            files = [Path(part) for part in stage.command if part.endswith(".py")]
            assert files and all(file.is_file() for file in files)
    assert sum(stage.seconds for stage in day.stages(False).values()) < 20 * 60
