"""A tiny model of every architecture of the installed transformers: rounded, saved, read back, calibrated; about an hour.

    python benchmarks/architectures.py [MODEL_TYPE ...] [--again] [--limit SECONDS] [--out FOLDER]

Each class runs in a process of its own with a limit of time; one that does not end is unknown, neither built nor unbuilt.
Results are kept in ``results/architectures.json`` after each class, and a later run goes on from there: it runs only what is new
or unknown, and with ``--again`` what failed. Models named on the command line are always run. ``results/architectures.md`` is the
table for people.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hf_quant.bench.machine import cpu_name
from tests.architectures import check_calibration, check_rounding, saved
from tests.tiny_models import NotBuiltError, built, classes_of, model_types

ROOT = Path(__file__).resolve().parents[1]
STATES = ("unknown", "failed", "unbuilt", "worked")  # of a class
LIMIT = 600  # seconds for a class
Row = dict[str, Any]


def examine(model_type: str, class_name: str, variant: str | None) -> Row:
    """Build one class and check it; the variant that could be built, faults and numbers."""
    quiet()
    model, used = built(model_type, class_name, variant)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = saved(model, folder)
        if base is None:
            return {"variant": used, "unbuilt": "transformers itself does not read it back as it was"}
        del model
        kind, inputs = base
        rounding = check_rounding(kind, inputs, folder)
        row = {"variant": used, "rounding": vars(rounding)}
        if rounding.numbers.get("layers"):
            row["calibration"] = vars(check_calibration(kind, inputs, folder))
        return row


def quiet() -> None:
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.disable(logging.WARNING)


def _work(pipe: Any, arguments: tuple[Any, ...]) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    try:
        pipe.send(examine(*arguments))
    except NotBuiltError as error:
        pipe.send({"unbuilt": str(error)[:200]})
    except Exception as error:
        pipe.send({"unbuilt": f"{type(error).__name__}: {error}"[:200]})


def limited(limit: float, *arguments: Any) -> Row:
    """`examine` in a process of its own, which is ended after ``limit`` seconds."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(limit) else {"unknown": f"it takes more than {limit:.0f} seconds"}
    except EOFError:
        return {"unknown": "its process ended"}
    finally:
        process.kill()
        process.join()


def state_of(row: Row) -> str:
    """One of `STATES`."""
    if "unknown" in row or "unbuilt" in row:
        return "unknown" if "unknown" in row else "unbuilt"
    parts = [part for part in (row["rounding"], row.get("calibration")) if part is not None]
    return "failed" if any(part["faults"] for part in parts) else "worked"


def page(rows: dict[str, Row]) -> str:
    """The table for people."""
    built = {name: row for name, row in rows.items() if state_of(row) in ("worked", "failed")}
    unbuilt = {name: row["unbuilt"] for name, row in rows.items() if state_of(row) == "unbuilt"}
    unknown = {name: row["unknown"] for name, row in rows.items() if state_of(row) == "unknown"}
    linear = {n: r for n, r in built.items() if r["rounding"]["numbers"].get("layers")}
    rounded = sum(not r["rounding"]["faults"] for r in linear.values())
    texts = {n: r["calibration"] for n, r in linear.items() if "calibration" in r}
    calibrated = sum(not part["faults"] for part in texts.values())
    types = {name.split(":")[0] for name in built}
    unseen = [kind for kind in model_types() if not any(name.startswith(f"{kind}:") for name in rows)]
    left = [kind for kind in unseen if classes_of(kind)]
    lines = [
        "# Architectures",
        "",
        f"One tiny random model of each class, transformers {version('transformers')}, torch {torch.__version__}, "
        f"{cpu_name()}, {date.today()}; made by `benchmarks/architectures.py`.",
        "",
        f"{len(built)} classes of {len(types)} model types can be built from a small configuration, {len(unbuilt)} "
        f"cannot, {len(unknown)} are not known, and {len(left)} model types have not been run; {len(unseen) - len(left)} more are "
        f"parts of others, without a class of their own. {len(linear)} classes have layers to quantize.",
        "",
        f"- Rounded (W4A16-g32, W8A8, W2A16-g32: load, run, generate, save, read back bit for bit, dequantized twin): "
        f"{rounded} of {len(linear)}.",
        f"- Calibrated (W4A16-g32, in memory and from shards with equal bits): {calibrated} of {len(texts)} that were tried, on text, images or sounds.",
        "",
        "| model type | class | rounded | calibrated |",
        "|---|---|---|---|",
    ]
    for name, row in sorted(linear.items()):
        kind, cls = name.split(":")
        calibration = _cell(row["calibration"]) if "calibration" in row else "not tried"
        lines.append(f"| {kind} | {cls} | {_cell(row['rounding'])} | {calibration} |")
    lines += ["", "## Nothing to quantize", "", ", ".join(sorted(built.keys() - linear.keys())), ""]
    if left:
        lines += ["## Not run", "", ", ".join(left), ""]
    for title, reasons in (("Not built from a small configuration", unbuilt), ("Not known", unknown)):
        if reasons:
            lines += [f"## {title}", "", "| class | reason |", "|---|---|"]
            lines += [f"| {name} | {_short(reason)} |" for name, reason in sorted(reasons.items())] + [""]
    return "\n".join(lines) + "\n"


def _cell(part: Row) -> str:
    if not part["faults"]:
        return "yes"
    step, fault = next(iter(part["faults"].items()))
    return f"{step}: {_short(fault)}"


def _short(sentence: str) -> str:
    return re.sub(r"\s+", " ", sentence.split(" (")[0]).replace("|", "/")[:110]


def examine_all(types: list[str], states: tuple[str, ...], limit: float, file: Path, rows: dict[str, Row]) -> None:
    """Examine the classes of model types that are in one of the states, and write ``file`` after each."""
    torch.set_num_threads(1)
    examine(
        "llama", "LlamaForCausalLM", None
    )  # once in this process, so that the others share what is imported on the way
    for model_type, class_name in ((kind, name) for kind in types for name in classes_of(kind)):
        name = f"{model_type}:{class_name}"
        before = rows.get(name, {"unknown": "not run yet"})
        if state_of(before) not in states:
            continue
        start = time.monotonic()
        row = limited(limit, model_type, class_name, before.get("variant"))
        seconds = round(time.monotonic() - start)
        rows[name] = {
            "versions": {n: version(n) for n in ("torch", "transformers", "hf-quant")},
            "seconds": seconds,
        } | row
        print(name, state_of(row), f"{seconds} s", row.get("unbuilt", row.get("unknown", "")), flush=True)
        for part in ("rounding", "calibration"):
            for step, fault in row.get(part, {}).get("faults", {}).items():
                print(f"    {part} {step}: {fault}", flush=True)
        file.write_text(json.dumps({"cpu": cpu_name(), "date": str(date.today()), "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a class")
    parser.add_argument("--page", action="store_true", help="only write the table")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    file = options.out / "architectures.json"
    rows: dict[str, Row] = json.loads(file.read_text())["rows"] if file.is_file() else {}
    quiet()
    states = STATES if options.types else STATES[:2] if options.again else STATES[:1]
    if not options.page:
        examine_all(options.types or model_types(), states, options.limit, file, rows)
    (options.out / "architectures.md").write_text(page(rows))
    print(Counter(map(state_of, rows.values())))


if __name__ == "__main__":
    main()
