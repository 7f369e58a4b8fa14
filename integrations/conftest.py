"""What the tests of all hosts share. Each runs the real host, offline, on the reference model of this repository."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
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
TESTS: dict[str, dict[str, Any]] = {}  # by id: how each ended, how long it took and what it saw


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


def cell(scheme: str, format: str, seen: str, device: str = "cpu") -> None:
    """Note what a host did with a scheme in a format, for `integrations/matrix`; it counts if the test passes.

    Args:
        scheme: Slug.
        format: As in ``hf-quant convert --to``.
        seen: In few words: ``"served"``, or why not.
        device: On which it ran.
    """
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    entry = {"scheme": scheme, "format": format, "seen": seen, "device": device}
    TESTS.setdefault(test, {}).setdefault("seen", []).append(entry)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep how a test ended; what was seen is written after each, so that a run that is cut short leaves what it has."""
    found = TESTS.setdefault(report.nodeid, {})
    found["seconds"] = round(found.get("seconds", 0) + report.duration, 1)
    if not report.passed or "outcome" not in found:
        found["outcome"] = report.outcome
    folder = os.environ.get("HF_QUANT_RESULTS")
    if report.when == "teardown" and folder:
        _write(Path(folder), report.nodeid)


def _write(folder: Path, test: str) -> None:
    """Renew a test in the file of its host, which is begun anew where versions have changed."""
    path, _, name = test.partition("::")
    host = Path(path).parent.name
    versions = [line.partition(": ")[2] for line in pytest_report_header() if line.startswith(f"{host}: ")]
    versions += [f"torch {torch.__version__}", f"transformers {version('transformers')}"]
    file = folder / f"{host}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    tests = before["tests"] if before.get("versions") == versions else {}
    known = {"versions": versions, "processor": _processor(), "date": f"{date.today():%Y-%m-%d}"}
    text = json.dumps(known | {"tests": tests | {name: TESTS[test]}}, indent=1, ensure_ascii=False, sort_keys=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


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


def written(folder: Path) -> str:
    """The format of a quantized checkpoint, as ``hf-quant convert --to`` calls it."""
    method: str = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    return "native" if method == "hf_quant" else method
