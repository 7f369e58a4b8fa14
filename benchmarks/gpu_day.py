"""Everything that needs a GPU, in one run that may be cut at any time: correctness first, then what is worth most.

    python benchmarks/gpu_day.py FOLDER [--stages correctness,linear] [--seconds 560]
    python benchmarks/gpu_day.py FOLDER --dry-run   # every stage with tiny shapes, without a GPU
    python benchmarks/gpu_day.py FOLDER --report    # tables of what lies in FOLDER, and results/gpu_day.*

Every stage is a program of its own with a limit of time. It appends its results to FOLDER/rows.jsonl line by line, and what it
prints to FOLDER/log.txt, so that a run that is cut loses nothing. What Triton compiles stays in its cache on disk: stages, and
later runs on the same machine, compile nothing twice.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TESTS = ("backends", "wna16", "outliers", "experts", "linear", "int8", "ops", "routing", "copies", "gpu")
PYTEST = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "_gpu_reports",
          "-W", "default", "-o", "minversion=7")  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A program and the most seconds it may take.

    Attributes:
        command: Arguments of Python.
        seconds: The limit.
        tool: A program that Python runs under; the stage is left out where it is not installed.
    """

    command: tuple[str, ...]
    seconds: int
    tool: tuple[str, ...] = ()


def stages(dry_run: bool) -> dict[str, Stage]:
    """In order of worth."""
    files = tuple(str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in TESTS)
    workers = ("-n", str(max(1, (os.cpu_count() or 2) - 4)))
    memcheck = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    tuned = ("--schemes", "W4A16-g128", "W8A16-g128", "--again")
    found = {
        "correctness": Stage((*PYTEST, *files[-1:]) if dry_run else (*PYTEST, *workers, *files), 180),
        "linear": Stage((str(HERE / "gpu_linear.py"),), 170),
        "model": Stage((str(HERE / "gpu_model.py"),), 150),
        "blocks": Stage((str(HERE / "gpu_blocks.py"),), 100),
        "sanitizer": Stage((*PYTEST, files[-1], "-k", "smallest"), 90, memcheck),
        "experts": Stage((str(HERE / "gpu_experts.py"),), 60),
        "training": Stage((str(HERE / "gpu_training.py"),), 90),
        "tiles": Stage((str(HERE / "gpu_tiles.py"),), 240),
        "linear_tuned": Stage((str(HERE / "gpu_linear.py"), *tuned), 90),
    }
    return {name: stage for name, stage in found.items() if not (dry_run and name == "linear_tuned")}


def run(name: str, stage: Stage, folder: Path, dry_run: bool, limit: float) -> Row:
    """Start a stage and wait for it, no longer than ``limit`` seconds; how it ended."""
    if stage.tool and shutil.which(stage.tool[0]) is None:
        return {"stage": name, "state": f"left out: {stage.tool[0]} is not installed", "seconds": 0.0}
    rows = folder / "rows.jsonl"
    environment = dict(
        os.environ, GPU_DAY_ROWS=str(rows), GPU_DAY_STAGE=name, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1"
    )
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    if stage.tool:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or writes past a tensor stay inside one large block
    if dry_run:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    own = () if "pytest" in stage.command else ("--rows", str(rows), *(("--dry-run",) if dry_run else ()))
    if dry_run and not own:
        environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    with (folder / "log.txt").open("a") as log:
        log.write(f"== {name}\n")
        log.flush()
        process = subprocess.Popen(
            [*stage.tool, sys.executable, *stage.command, *own],
            stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            state = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            state = f"cut after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"stage": name, "state": state, "seconds": round(time.monotonic() - start, 1)}


def rows_of(folder: Path) -> list[Row]:
    """All results; a line that was cut in the middle is left out."""
    found = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(rows: list[Row]) -> list[str]:
    """One stage as a table: the columns are whatever its rows hold."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return lines + ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in flat]


def _flat(row: Row) -> Row:
    """Nested values by their last name; the ratio to bf16 beside times of a layer."""
    found: Row = {}
    for name, value in row.items():
        if name == "us" and isinstance(value, dict):
            found |= {f"{who} us": time for who, time in value.items()}
            found["bf16 / ours"] = value["bf16"] / value["ours"]
        elif name != "stage":
            found[name] = value
    return found


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)[:160].replace("|", "/").replace("\n", " ")


def page(rows: list[Row]) -> str:
    """For people: the states of the stages, where ours is slower than bf16, and every row."""
    states = [{"program": row["stage"], **row} for row in rows if "state" in row]
    slower = [
        f"{row['scheme']} {row['N']}x{row['K']} M={row['M']}{' tuned' if row.get('tuned') else ''}"
        for row in rows
        if "us" in row and isinstance(row["us"], dict) and row["us"]["ours"] > row["us"]["bf16"]
    ]
    gpu = next((row["gpu"] for row in rows if "gpu" in row), "no GPU")
    lines = [f"# A day with a GPU: {gpu}, {date.today()}", "", *table(states), ""]
    lines += [f"Slower than bf16: {', '.join(slower) or 'nowhere'}.", ""]
    for name in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == name and "state" not in row]
        kinds: dict[tuple[str, ...], list[Row]] = {}
        for row in own:
            kinds.setdefault(tuple(row), []).append(row)
        lines += [f"## {name}", ""]
        for group in kinds.values():
            lines += [*table(group), ""]
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--stages", help="Names with commas between them; default: all.")
    options.add_argument("--seconds", type=float, default=560, help="The whole run takes no longer.")
    options.add_argument("--dry-run", action="store_true")
    options.add_argument("--report", action="store_true", help="Only write tables of what lies in FOLDER.")
    arguments = options.parse_args()
    folder = arguments.folder
    if arguments.report:
        from _results import write  # needs the package, which a stage finds beside this folder

        rows = rows_of(folder)
        write("gpu_day", rows, page(rows))
        return
    known = stages(arguments.dry_run)
    wanted = arguments.stages.split(",") if arguments.stages else list(known)
    if strange := [name for name in wanted if name not in known]:
        options.error(f"no such stage: {', '.join(strange)}; there are {', '.join(known)}")
    folder.mkdir(parents=True, exist_ok=True)
    until, failed = time.monotonic() + arguments.seconds, False
    for name in wanted:
        left = until - time.monotonic()
        state = {"stage": name, "state": "left out: no time", "seconds": 0.0}
        if left > 5:
            state = run(name, known[name], folder, arguments.dry_run, min(left, known[name].seconds))
        with (folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(state) + "\n")
        print(json.dumps(state), flush=True)
        failed |= not state["state"].startswith(("done", "left out"))
    (folder / "report.md").write_text(page(rows_of(folder)))
    sys.exit(failed)


if __name__ == "__main__":
    main()
