"""What the tests of all hosts share. Each runs the real host, offline, on the reference model of this repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HOSTS = Path(__file__).parent
REFERENCE = HOSTS.parent / "examples" / "ref-llama-16m"
_HOME = tempfile.TemporaryDirectory(prefix="hf-quant-hosts-")
os.environ |= {"HF_HOME": _HOME.name, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # read on import
os.environ["PYTHONSAFEPATH"] = "1"  # the folder of a host must not pass for its package

import pytest
import torch

Saved = Callable[..., Path]
FIGURES: list[str] = []


def pytest_report_header() -> list[str]:
    """Versions that run now, beside those that were tried."""
    lines = []
    for file in sorted(HOSTS.glob("*/requirements.txt")):
        for name, _, tried in (line.partition("==") for line in file.read_text().split() if "==" in line):
            try:
                now = version(name.partition("[")[0])
            except PackageNotFoundError:
                continue
            lines.append(f"{file.parent.name}: {name} {now}" + ("" if now == tried else f", tried with {tried}"))
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Hosts warn of much that is theirs: warnings are no errors here."""
    for item in (item for item in items if HOSTS in item.path.parents):
        item.add_marker(pytest.mark.filterwarnings("default"))


def record(what: str, **figures: Any) -> None:
    """Show what a test measured at the end of the run."""
    rounded = json.dumps(figures, default=str)
    FIGURES.append(f"{what}: {re.sub(r'[0-9]+[.][0-9]{5,}', lambda match: f'{float(match[0]):.4g}', rounded)}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The figures that were recorded."""
    for line in FIGURES:
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """``saved("W4A16-g32", "gptq")`` is a folder with the reference model, quantized by the command and converted.

    Formats are those of ``hf-quant convert --to``; other options of ``hf-quant quantize`` may follow.
    """
    root, made = tmp_path_factory.mktemp("saved"), {}

    def folder(scheme: str, to: str = "native", *options: str) -> Path:
        key = "_".join((scheme, to, *options)).replace("/", "-")
        if key not in made:
            made[key] = root / key
            if to in ("native", "compressed-tensors"):
                command(
                    "quantize", REFERENCE, "-o", root / key, "--scheme", scheme, "--format", to, "--no-eval", *options
                )
            else:
                command("convert", folder(scheme, "native", *options), "--to", to, "-o", root / key)
        return made[key]

    return folder


def command(*arguments: Any) -> str:
    """What ``hf-quant ...`` prints."""
    return run([sys.executable, "-m", "hf_quant.cli", *arguments])


def run(arguments: list[Any], **options: Any) -> str:
    """What a program prints; the test fails with its errors if it fails."""
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def of_ours(model: torch.nn.Module) -> int:
    """How many layers of a model are quantized layers of this package."""
    return sum(type(module).__module__.startswith("hf_quant.nn") for module in model.modules())
