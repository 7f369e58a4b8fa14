"""What the stages of a day with a GPU share: a file of rows that grows while they run, and times on a GPU or a CPU."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Rows:
    """Results, each written to a file as soon as it is there, so that a stage that is cut loses none."""

    def __init__(self, stage: str, path: Path | None) -> None:
        self.stage, self.path = stage, path

    def add(self, **row: Any) -> None:
        line = json.dumps({"stage": self.stage, **row})
        print(line, flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(line + "\n")

    def attempt(self, what: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> bool:
        """Add what ``measure`` gives, or the error it ends in; whether it gave something."""
        try:
            self.add(**what, **measure())
        except Exception as error:  # of any type: one cell that fails must not cost the others
            self.add(**what, failed=f"{type(error).__name__}: {str(error)[:300]}")
            return False
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return True


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of the options that every stage has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", type=Path, help="Append each result to this file, as a line of JSON.")
    made.add_argument("--dry-run", action="store_true", help="Tiny shapes, on the CPU; its times mean nothing.")
    return made


def device_for(dry_run: bool) -> torch.device:
    """The GPU, or the CPU of a dry run."""
    if dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("No GPU here: nothing was measured. --dry-run checks the script without one.")
    return torch.device("cuda")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device, repeats: int = 3, warm: int = 1) -> float:
    """The median time of a call on the clock, after ``warm`` calls that are not timed."""
    times = []
    for i in range(warm + repeats):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        if i >= warm:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def gigabytes(device: torch.device) -> dict[str, float]:
    """Memory in use on the GPU and its peak since the last `reset_peak`; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "gb": torch.cuda.memory_allocated(device) / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
    }


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
