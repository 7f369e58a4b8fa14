"""Nothing that the commands print can drive a terminal, hide, or fill the screen, whoever chose the names in it."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import hf_quant.cli
from hf_quant import _plugins
from hf_quant.cli import main
from hf_quant.cli._common import emit, say, waiting
from hf_quant.errors import LONGEST, printable
from hf_quant.jobs import progress
from hf_quant.jobs.outputs import shown
from hf_quant.jobs.push import PushResult
from hf_quant.jobs.results import Grid, fields, table

EVIL = "a\x1b[31m\x07\r\u202e\u200b\x9b\udcff"
ESCAPED = r"a\x1b[31m\x07\r\u202e\u200b\x9b\udcff"


def test_escapes() -> None:
    assert printable(EVIL) == shown(EVIL) == ESCAPED
    assert (printable("a\nb"), shown("a\nb")) == ("a\nb", r"a\nb")
    assert len(printable("\x07" * 10**6)) < LONGEST and len(shown(Path("\n" * 10**6))) < LONGEST


@pytest.mark.parametrize(
    "arguments",
    [
        [EVIL], [f"--{EVIL}"], ["plan"], ["plan", f"--{EVIL}"], ["plan", "x", EVIL], ["plan", "x", "--scheme", EVIL],
        ["plan", f"/{EVIL}"], ["plan", "x", "--bits", EVIL], ["plan", "x", "--method", EVIL], ["inspect", EVIL],
        ["push", f"/{EVIL}", "a/b"], ["verify", EVIL], ["card", EVIL], ["card", "show", f"/{EVIL}"],
        ["convert", EVIL, "--to", EVIL, "-o", EVIL], ["quantize", EVIL, "-o", EVIL], ["eval", EVIL, "--text", EVIL],
        ["eval", "x", "--text", EVIL * 10**4], ["plan", "x" * 10**5], [EVIL * 10**4],
    ],
)  # fmt: skip
def test_wrong_usage(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit), done.exception
    assert done.output.replace("\n", "").isprintable() and len(done.output) < LONGEST + 1000


def test_results(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    say(f"{EVIL}\n{'x' * 10**5}")
    first, second, last = capsys.readouterr().err.split("\n")
    assert (first, len(second) < LONGEST, last) == (ESCAPED, True, "")
    assert table(("a", "b"), [(f"{EVIL}\n", "1")]).splitlines()[1] == f"{ESCAPED}\\n  1"
    emit(False, False, record={}, essential="", human=f"{EVIL}\nb")
    emit(False, True, record={}, essential="a\tb", human="")
    emit(True, True, record={"name": EVIL}, essential="", human="")
    assert capsys.readouterr().out.splitlines() == [
        ESCAPED,
        "b",
        "a\tb",
        '{"name": "' + r"a\u001b[31m\u0007\r\u202e\u200b\u009b\udcff" + '"}',
    ]
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    emit(False, True, record={}, essential=EVIL, human="")
    assert terminal.getvalue() == f"{ESCAPED}\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("titles", "count", "turned"), [(9, 2, True), (6, 30, False), (3, 1, False)])
def test_a_table_fits_the_terminal(titles: int, count: int, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is too wide has titles in two lines, or is turned on its side; in a pipe it is one line a row."""
    head = ("scheme", "bits/weight", "95 % interval", *(f"measure {i}" for i in range(6)))[:titles]
    rows = [tuple(f"{10 ** (i % 7)}.{row:02}" for i in range(titles)) for row in range(count)]
    monkeypatch.setenv("COLUMNS", "80")
    terminal, pipe = Terminal(), io.StringIO()
    for out in (terminal, pipe):
        monkeypatch.setattr(sys, "stdout", out)
        emit(False, False, record={}, essential="", human=[Grid(head, rows)])
    lines = re.sub(r"\x1b\[\d*m", "", terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert all(cell in words for row in rows for cell in row)
    assert (lines[1].split()[0] == "bits/weight") is turned
    assert len(pipe.getvalue().splitlines()) == count + 1 and "\x1b" not in pipe.getvalue()


def test_a_turned_table_has_its_numbers_to_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a column with a word among them."""
    head = ("model", *(f"measure {i}" for i in range(9)))
    rows = [("base", *["1.5"] * 8, "noise floor"), ("W4", *["10.25"] * 8, "chosen")]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    emit(False, False, record={}, essential="", human=[Grid(head, rows)])
    lines = [line.rstrip() for line in re.sub(r"\x1b\[\d*m", "", terminal.getvalue()).splitlines()]
    assert len({len(line) for line in lines}) == 1, lines


@pytest.mark.parametrize("name", _plugins.names("cli"))
def test_every_command_shows_that_it_is_at_work(name: str) -> None:
    source = (Path(hf_quant.cli.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    assert "bars(" in source or "waiting(" in source


def test_a_wait_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal, and not with --quiet."""
    monkeypatch.setattr(progress, "SILENT", 0.0)
    monkeypatch.setattr(progress, "TICK", 0.01)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    for quiet in (False, True):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        with waiting("drawing", quiet):
            time.sleep(0.2)
        assert ("drawing: " in terminal.getvalue()) is not quiet


def test_records_in_words() -> None:
    record = {"bits": 4, "group_size": None, "sound": True, "notes": [], "bytes": 18_200_000, "left": ["a", "b"],
              "bytes_by_dtype": {"BF16": 31_470_336}, "share_quantized": 0.9421, "act_order": False}  # fmt: skip
    assert [" ".join(row) for row in fields(record)] == [
        "bits 4", "sound yes", "bytes 18.2 MB", "left a, b", "bytes by dtype BF16: 31.5 MB", "share quantized 94.2%",
        "act order no",
    ]  # fmt: skip


def test_plan_of_a_push() -> None:
    """A name with an end of line in it is one file, not two."""
    files = (f"{EVIL}\nREADME.md", "config.json")
    lines = repr(PushResult("a/b", None, None, False, EVIL, None, f"x\n{EVIL}", EVIL, files, 1)).split("\n")
    assert len(lines) == 6 and all(line.isprintable() for line in lines), lines
