import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_quant.disk.journal import NAME, open_journal
from hf_quant.disk.journal import _line as journal_line
from hf_quant.errors import DiskError, HfQuantError

PLAN = {"method": "gptq", "bits": 4}


def work(folder: Path, upto: int, said: list[str] | None = None, plan: dict[str, Any] = PLAN) -> list[str]:
    """Do parts until there are ``upto``; gives the names of those that were done before."""
    with open_journal(folder, plan, (said if said is not None else []).append) as done:
        before = [part["file"] for part in done.parts]
        for i in range(len(done.parts), upto):
            done.add(f"part-{i}", lambda path, i=i: path.write_text(f"content {i}"), {"number": i})
        assert [part["number"] for part in done.parts] == list(range(max(upto, len(before))))
    return before


def test_going_on(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out.work"
    assert work(folder, 2) == []
    assert work(folder, 4) == ["part-0", "part-1"]
    assert work(folder, 4) == [f"part-{i}" for i in range(4)]
    assert {p.name for p in folder.iterdir()} == {NAME, *(f"part-{i}" for i in range(4))}


def test_other_settings(tmp_path: Path) -> None:
    """They take a folder without a part; one with parts keeps its own."""
    other = PLAN | {"bits": 3}
    work(tmp_path, 0)
    assert work(tmp_path, 1, plan=other) == []
    with pytest.raises(HfQuantError, match=r"was begun with other settings \(bits\)"):
        work(tmp_path, 2)
    assert work(tmp_path, 2, plan=other) == ["part-0"]


def test_a_failed_part_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), open_journal(tmp_path, PLAN, print) as done:
        done.add("part-0", fail, {})
    assert {p.name for p in tmp_path.iterdir()} == {NAME}
    assert work(tmp_path, 1) == []


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_torn_last_line_never_counted(tmp_path: Path, cut: int) -> None:
    work(tmp_path, 3)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-cut])
    assert work(tmp_path, 3) == ["part-0", "part-1"]
    assert work(tmp_path, 3) == ["part-0", "part-1", "part-2"]


@pytest.mark.parametrize("garbage", [b"\0" * 5000 + b'"number": 3}\n', b"\0" * 4096, b"\n\n", b"deadbeef {}\n"])
def test_garbage_at_the_end_never_counted(tmp_path: Path, garbage: bytes) -> None:
    """A line of several pages whose first page did not reach the disk still ends like a line."""
    work(tmp_path, 3)
    with (tmp_path / NAME).open("ab") as file:
        file.write(garbage)
    assert work(tmp_path, 4) == ["part-0", "part-1", "part-2"]
    assert work(tmp_path, 4) == [f"part-{i}" for i in range(4)]


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    work(tmp_path, 2)
    for name in (".part-2.77.tmp", "part-2", ".journal.jsonl.77.tmp", "LOCK"):
        (tmp_path / name).write_text("pid")  # the lock is cut off behind that
    (tmp_path / "activations-x").mkdir()
    (tmp_path / "activations-x" / "hidden").write_text("many")
    assert work(tmp_path, 2) == ["part-0", "part-1"]
    assert {p.name for p in tmp_path.iterdir()} == {NAME, "part-0", "part-1"}


def test_nothing_is_appended_to_half_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def failing(handle: int) -> None:
        sync(handle)
        if os.path.samestat(os.fstat(handle), (tmp_path / NAME).stat()):
            raise OSError(5, "Input/output error")

    with open_journal(tmp_path, PLAN, print) as done:
        done.add("part-0", lambda path: path.write_text("content 0"), {"number": 0})
        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(DiskError, match=r"journal\.jsonl: Input/output error"):
            done.add("part-1", lambda path: path.write_text("content 1"), {"number": 1})
        monkeypatch.setattr(os, "fsync", sync)
        with pytest.raises(DiskError, match=r"journal\.jsonl: a line could not be written before"):
            done.add("part-2", lambda path: path.write_text("content 2"), {"number": 2})
    assert work(tmp_path, 3) == ["part-0", "part-1"]  # whose line was written, though nobody knew


def test_records_are_the_same_before_and_after(tmp_path: Path) -> None:
    with open_journal(tmp_path, PLAN, print) as done:
        done.add("part-0", lambda path: path.write_text("0"), {"z": (1, 2), "a": {"y": 0.1, "b": None}})
        first = json.dumps(done.parts)
    with open_journal(tmp_path, PLAN, print) as done:
        assert json.dumps(done.parts) == first


def test_a_journal_that_was_never_begun(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"0123 {")
    assert work(tmp_path, 1) == []


def test_a_damaged_line_is_refused(tmp_path: Path) -> None:
    work(tmp_path, 3)
    lines = (tmp_path / NAME).read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"part-1", b"part-7")
    (tmp_path / NAME).write_bytes(b"".join(lines))
    with pytest.raises(HfQuantError, match=r"journal\.jsonl: line 3 is damaged"):
        work(tmp_path, 3)


def _swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], lines[3]]


def _twice(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[-1]]


def _elsewhere(lines: list[bytes]) -> list[bytes]:
    entry = json.loads(lines[1].partition(b" ")[2])
    return [lines[0], journal_line(entry | {"file": "../part-0"}), *lines[2:]]


@pytest.mark.parametrize(("change", "line"), [(_swapped, 2), (_twice, 5), (_elsewhere, 2)])
def test_a_line_stands_for_its_own_part(change: Any, line: int, tmp_path: Path) -> None:
    work(tmp_path, 3)
    path = tmp_path / NAME
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(HfQuantError, match=rf"journal\.jsonl: line {line} is not that of part {line - 2}; delete"):
        work(tmp_path, 3)


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_part_is_done_again_with_all_after_it(tmp_path: Path, damage: str) -> None:
    work(tmp_path, 4)
    part = tmp_path / "part-2"
    if damage == "flip":
        part.write_text("Content 2")
    else:
        part.unlink()
    said: list[str] = []
    assert work(tmp_path, 4, said) == ["part-0", "part-1"]
    assert len(said) == 1 and "part-2" in said[0]
    assert part.read_text() == "content 2"
    assert work(tmp_path, 4) == [f"part-{i}" for i in range(4)]


def test_another_plan_is_refused_by_name(tmp_path: Path) -> None:
    work(tmp_path, 1)
    with pytest.raises(HfQuantError, match=r"other settings \(bits, damp\)"):
        work(tmp_path, 1, plan={"method": "gptq", "bits": 3, "damp": 0.1})
    assert work(tmp_path, 1) == ["part-0"]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hf_quant.disk.journal import open_journal\n"
        f"with open_journal(Path({str(tmp_path)!r}), {PLAN!r}, print): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with pytest.raises(HfQuantError, match=f"another process \\(pid {other.pid} on .*\\) works there"):
            work(tmp_path, 1)
        other.kill()
    assert work(tmp_path, 1) == []
