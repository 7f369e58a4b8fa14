import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_quant.errors import HfQuantError
from hf_quant.journal import NAME, journal

PLAN = {"method": "gptq", "bits": 4}


def work(folder: Path, upto: int, said: list[str] | None = None, plan: dict[str, Any] = PLAN) -> list[str]:
    """Do parts until there are ``upto``; gives the names of those that were done before."""
    with journal(folder, plan, (said if said is not None else []).append) as done:
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


def test_a_failed_part_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), journal(tmp_path, PLAN, print) as done:
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
        "import sys; from pathlib import Path; from hf_quant.journal import journal\n"
        f"with journal(Path({str(tmp_path)!r}), {PLAN!r}, print): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with pytest.raises(HfQuantError, match=f"another process \\(pid {other.pid} on .*\\) works there"):
            work(tmp_path, 1)
        other.kill()
    assert work(tmp_path, 1) == []
