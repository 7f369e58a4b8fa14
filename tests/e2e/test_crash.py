"""SIGKILL, failing disks and loss of power, in short; ``benchmarks/crash.py`` does all of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant.disk import folders, journal
from hf_quant.jobs import compress as job

from .crashes import (
    FEW,
    SCENARIOS,
    SCHEMES,
    TINY,
    WRONG,
    Case,
    contents,
    fault,
    killed,
    make_model,
    power,
    quantize,
    record,
)
from .faulty_disk import KINDS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX file systems")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Results may depend on the number of threads, and a child must not need those of its parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("crash")
    made = Case.of(make_model(root / "model"), root / "q", *TINY)
    torch.set_num_threads(before)
    return made


def test_one_operation_fails(case: Case, tmp_path: Path) -> None:
    """Every third operation in one way."""
    count = len(record(case, tmp_path / "disk", SCENARIOS["begun and finished"], lambda path, folder: False).trace)
    codes = set()
    for at in range(1, count + 1, 3):
        run, on, wrong = fault(case, tmp_path / "disk", at, KINDS[at // 3 % 4])
        assert not wrong, f"{on.kind} at {on.trace[-1]}: {wrong}"
        codes.add(run.code)
    assert count > 90 and codes == {None, 0, 1}


@pytest.mark.parametrize("name", SCENARIOS)
def test_power_fails(name: str, case: Case, tmp_path: Path) -> None:
    tally = power(case, tmp_path, SCENARIOS[name], 1, every=12)
    assert tally.states > 80 and tally.repeated > 6 and not tally.wrong


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_protocol_is_found_out(name: str, case: Case, tmp_path: Path) -> None:
    wrong = WRONG[name]
    scenario = SCENARIOS[wrong.scenario]
    with wrong.active():  # between two renames there are few moments to lose power at
        tally = power(case, tmp_path, scenario, 4 if scenario.old else 2, every=0, deaf=wrong.deaf)
    assert tally.wrong, name


@pytest.mark.parametrize("name", ["W8A8", "W8A8-static", "W4A16 with W8A8", "W3A16 with outliers, native"])
def test_killed_at_random_moments(name: str, case: Case, tmp_path: Path) -> None:
    start = time.perf_counter()
    case = Case.of(case.model, tmp_path / "whole" / "q", *SCHEMES[name], *FEW)
    made = killed(case, tmp_path, 3, time.perf_counter() - start, random.Random(0))
    assert made.kills >= 3 and made.outputs >= 1 and not made.wrong


@pytest.fixture
def _heard() -> Iterator[None]:
    """What a shell starts in the background does not hear Ctrl-C, and neither does a command that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(
    number: signal.Signals, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, before = journal.Journal.add, signal.getsignal(number)

    def add(self: journal.Journal, *args: Any) -> None:
        inner(self, *args)
        if len(self.parts) == 2:
            os.kill(os.getpid(), number)

    out = tmp_path / "q"
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", add)
        run = quantize(case.model, out, *case.options)
    assert run.code == 128 + number and f"Stopped by {number.name}" in run.said
    assert f"{out}.work holds the finished blocks: the same command goes on from there" in run.said
    assert [path.name for path in tmp_path.iterdir()] == ["q.work"]
    assert signal.getsignal(number) is before
    assert quantize(case.model, out, *case.options).began == ["block-00002.safetensors"]
    assert contents(out) == case.whole


def test_stopped_among_several_schemes(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is whole and would be refused; the advice is one that works."""
    inner, parts = journal.Journal.add, []

    def add(self: journal.Journal, *args: Any) -> None:
        inner(self, *args)
        parts.append(args[0])
        if len(parts) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    more = (*case.options, "--scheme", "W8A16-g32")
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", add)
        run = quantize(case.model, tmp_path / "q", *more)
    out = tmp_path / "q" / "W8A16-g32"
    assert run.code == 143 and (tmp_path / "q" / "W4A16-g32" / "results.json").is_file()
    assert f"the same command with --scheme W8A16-g32 -o {out} goes on from there" in run.said
    assert quantize(case.model, out, *more[2:]).began == ["block-00002.safetensors"]


def test_a_second_signal_ends_it_at_once(case: Case, tmp_path: Path) -> None:
    """While the first one unwinds; in a child, since it is the end of it."""
    child = os.fork()
    if child == 0:
        inner = shutil.rmtree

        def slow(path: Any, *args: Any, **options: Any) -> None:
            if ".stage-" in str(path):
                os.kill(os.getpid(), signal.SIGTERM)
            inner(path, *args, **options)

        shutil.rmtree = slow  # type: ignore[assignment]
        journal.Journal.add = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[method-assign]
        try:
            quantize(case.model, tmp_path / "q", *case.options)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert quantize(case.model, tmp_path / "q", *case.options).code == 0
    assert contents(tmp_path / "q") == case.whole and [p.name for p in tmp_path.iterdir()] == ["q"]


def test_another_process_is_refused_at_any_time(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, during and after calibration, and while the result is checked and published."""
    said: list[str] = []

    def after(place: Any, name: str) -> None:
        inner = getattr(place, name)

        def both(*args: Any, **options: Any) -> Any:
            made = inner(*args, **options)
            if not busy:
                busy.append(name)
                other = quantize(case.model, tmp_path / "q", *case.options, "--overwrite")
                busy.clear()
                assert other.code == 1 and not other.began
                said.append(other.said)
            return made

        monkeypatch.setattr(place, name, both)

    busy: list[str] = []
    for place, name in (
        (job, "_published"), (journal, "put"), (job, "quantize_streaming"), (job, "load"),
        (job, "_measured"), (folders, "_swap"), (job, "discard"),
    ):  # fmt: skip
        after(place, name)
    assert quantize(case.model, tmp_path / "q", *case.options).code == 0
    assert len(said) > 8 and all(f"{tmp_path}/q: another process (pid {os.getpid()} on " in each for each in said)
    assert contents(tmp_path / "q") == case.whole and [p.name for p in tmp_path.iterdir()] == ["q"]


def test_a_full_disk_is_seen_before_work_begins(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        run = quantize(case.model, tmp_path / "q", *case.options)
    assert run.code == 1 and not run.began and "bytes are needed, 10,000 are free" in run.said
    assert quantize(case.model, tmp_path / "q", *case.options).code == 0


def test_killed_between_publishing_and_clearing_up(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the same command finishes, though OUT is there; another one is refused, and OUT stays."""
    out = tmp_path / "q"
    with monkeypatch.context() as patch:
        patch.setattr(job, "discard", lambda *_: None)
        assert quantize(case.model, out, *case.options).code == 0
    work = tmp_path / "q.work"
    assert work.is_dir()
    other = quantize(case.model, out, "--scheme", "W8A16-g32", "--calibration-tokens", "256", "--no-eval")
    assert other.code == 1 and "begun with other settings (config)" in other.said and contents(out) == case.whole
    plain = quantize(case.model, out, "--scheme", "W8A16-g32", "--method", "rtn", "--no-eval")
    assert plain.code == 1 and "exists and is not empty" in plain.said and contents(out) == case.whole
    run = quantize(case.model, out, *case.options)
    assert run.code == 0 and not run.began and not work.exists() and contents(out) == case.whole
    assert "exists and is not empty" in quantize(case.model, out, *case.options).said


def test_folders_of_others_are_left_alone(case: Case, tmp_path: Path) -> None:
    work = tmp_path / "q.work"
    work.mkdir()
    (work / "thesis.tex").write_text("text")
    run = quantize(case.model, tmp_path / "q", *case.options)
    assert run.code == 1 and "holds thesis.tex and no journal" in run.said
    assert [path.name for path in work.iterdir()] == ["thesis.tex"]
