"""Writing is all or nothing; what that means when the power fails is in test_crash.py."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_quant.disk import folders
from hf_quant.disk.atomic import blaming, copy_file, fsync, link_file, need_space, put, write_json
from hf_quant.disk.folders import discard, staged
from hf_quant.disk.locks import locked
from hf_quant.errors import CheckpointError, DiskError, HfQuantError


class Crash(BaseException):
    """Not an Exception: like KeyboardInterrupt."""


def test_staged_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with staged(out) as stage:
        assert stage.is_dir() and stage.parent == out.parent and not out.exists()
        (stage / "sub").mkdir()
        (stage / "sub" / "a").write_text("1")
    assert (out / "sub" / "a").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, Crash, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_staged_leaves_nothing_after_a_crash(overwrite: bool, error: type[BaseException], tmp_path: Path) -> None:
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "old").write_text("1")
    with pytest.raises(error), staged(out, overwrite=overwrite) as stage:
        (stage / "a").write_text("1")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    assert not overwrite or [path.name for path in out.iterdir()] == ["old"]


def test_staged_refuses_what_exists(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(CheckpointError, match="out: exists"), staged(tmp_path / "out"):
        pytest.fail("the body must not run")
    (tmp_path / "file").write_text("1")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="file"), staged(tmp_path / "file", overwrite=overwrite):
            pytest.fail("the body must not run")
    assert (tmp_path / "file").read_text() == "1"
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty") as stage:
        (stage / "a").write_text("1")
    assert (tmp_path / "empty" / "a").exists()


def test_staged_overwrites_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with staged(out, overwrite=True) as stage:
        (stage / "new").write_text("1")
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_staged_puts_the_old_back_if_the_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "old").write_text("1")

    def failing(self: Path, target: Path) -> Path:
        if ".stage-" in self.name:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"), staged(out, overwrite=True) as stage:
        (stage / "new").write_text("1")
    assert [path.name for path in out.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    log: list[int | str] = []
    fsync, rename = os.fsync, Path.rename

    def noted(handle: int) -> None:
        log.append(os.fstat(handle).st_ino)
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        log.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    with staged(out) as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "a").write_text("1")
    want = {path.stat().st_ino for path in (out, out / "sub", out / "sub" / "a")}
    assert want <= set(log[: log.index("rename")])
    assert log[-1] == tmp_path.stat().st_ino


def test_write_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


# -- what killed processes leave ----------------------------------------------------------------------------------


HOLD = """
import sys; from pathlib import Path; from hf_quant.disk.folders import staged; from hf_quant.disk.locks import locked
with {}:
    print("in", flush=True); sys.stdin.read()
"""


class Other:
    """Another process that is in the midst of something until it is killed."""

    def __init__(self, doing: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD.format(doing)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> int:
        assert self.process.stdout is not None and self.process.stdout.readline() == b"in\n"
        return self.process.pid

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_lock_names_its_process_and_dies_with_it(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "lock"
    with Other(f"locked(Path({str(file)!r}), Path('OUT'))") as pid, pytest.raises(HfQuantError) as refused:
        locked(file, Path("OUT")).__enter__()
    assert str(refused.value).startswith(f"OUT: another process (pid {pid} on ") and file.exists()
    with locked(file, Path("OUT")):
        assert file.read_text().startswith(f"pid {os.getpid()} on ")
        with pytest.raises(HfQuantError, match=f"pid {os.getpid()} "), locked(file, Path("OUT")):
            pytest.fail("the body must not run")
    assert not file.exists()


def test_stages_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Other(f"staged(Path({str(out)!r}))"):
        with staged(out) as stage:
            assert len(list(tmp_path.iterdir())) == 2
            (stage / "a").write_text("1")
        assert sorted(path.name[:5] for path in tmp_path.iterdir()) == [".out.", "out"]
    with pytest.raises(CheckpointError, match="exists"), staged(out):
        pytest.fail("the body must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_swap_that_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot exchange names there is a moment without OUT; whoever comes next puts it back."""
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    out, old, mine = tmp_path / "out", tmp_path / ".out.before-0123abcd", tmp_path / ".out.old"
    mine.mkdir()
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(CheckpointError, match="exists and is not empty"), staged(out):
        pytest.fail("the body must not run")
    assert (out / "a").read_text() == "old"
    old.mkdir()
    with staged(out, overwrite=True) as stage:
        (stage / "a").write_text("new")
    assert (out / "a").read_text() == "new" and sorted(path.name for path in tmp_path.iterdir()) == [".out.old", "out"]


def test_discard_takes_a_folder_away_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out = tmp_path / "out.work", tmp_path / "out"
    work.mkdir()
    (work / "a").write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        discard(work, out)
    assert not work.exists() and len(list(tmp_path.iterdir())) == 1
    with staged(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_old_drafts_go_and_young_ones_may_be_in_use(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".a[1].json.7.tmp", ".a[1].json.8.tmp", ".b.json.7.tmp"))
    for draft in (old, young, other):
        draft.write_text("half")
    os.utime(old, (time.time() - 4000,) * 2)
    write_json(tmp_path / "a[1].json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([young.name, other.name, "a[1].json"])


def test_hidden_files_of_other_names_stay(tmp_path: Path) -> None:
    """What a user calls nearly like a draft, a stage or an old folder is not ours to remove, however old it is."""
    for name in (".out.stage-mine", ".out.old", ".out.stage-0123abcd.bak"):
        (tmp_path / name).mkdir()
    for name in (".a.json.mine.tmp", ".a.json.7.backup.tmp"):
        (tmp_path / name).write_text("precious")
        os.utime(tmp_path / name, (0, 0))
    before = {path.name for path in tmp_path.iterdir()}
    write_json(tmp_path / "a.json", {})
    for _ in range(2):
        with staged(tmp_path / "out", overwrite=True):
            pass
    assert {path.name for path in tmp_path.iterdir()} == before | {"a.json", "out"}


def test_two_threads_write_one_file(tmp_path: Path) -> None:
    """Each has a draft of its own, so that what stands there in the end is whole."""
    path, barrier = tmp_path / "a.json", threading.Barrier(2, timeout=30)

    def write(text: str) -> None:
        def slowly(draft: Path) -> None:
            barrier.wait()
            draft.write_text(text)
            barrier.wait()

        put(path, slowly)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("one" * 1000, "other")))
    assert path.read_text() in ("one" * 1000, "other") and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    """Some libraries write files that only their owner can read."""
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            with staged(tmp_path / f"{umask:o}") as stage:
                (stage / "sub").mkdir()
                (stage / "sub" / "a").touch(0o600)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{umask:o}" / "sub" / "a").stat().st_mode) == mode


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "hard link", "pipe", "folder"])
def test_a_lock_harms_nothing_that_is_in_its_place(kind: str, tmp_path: Path) -> None:
    lock, victim = tmp_path / "lock", tmp_path / "victim"
    if kind != "dangling":
        victim.write_text("precious")
    {
        "link": lambda: lock.symlink_to(victim), "dangling": lambda: lock.symlink_to(victim),
        "file": lambda: lock.write_text("precious"), "hard link": lambda: lock.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(lock), "folder": lambda: lock.mkdir(),
    }[kind]()  # fmt: skip
    with pytest.raises(HfQuantError, match="/lock: "), locked(lock, tmp_path / "out"):
        pytest.fail("the body must not run")
    assert victim.exists() == (kind != "dangling") and lock.lstat()
    assert kind == "dangling" or victim.read_text() == "precious"
    assert kind != "file" or lock.read_text() == "precious"


def test_a_lock_that_was_left_behind_is_taken(tmp_path: Path) -> None:
    for left in ("", "pid 7 on other", "pi", "\0" * 15):
        (tmp_path / "lock").write_text(left)
        with locked(tmp_path / "lock", tmp_path / "out"):
            assert (tmp_path / "lock").read_text().startswith(f"pid {os.getpid()} on ")


# -- errors -------------------------------------------------------------------------------------------------------


def test_errors_name_file_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    path = tmp_path / "a"
    need_space(path, 1000)
    with pytest.raises(DiskError, match=r"/a: the disk is full: 1,001 bytes are needed, 1,000 are free"):
        need_space(path, 1001)
    for code in (28, 122):
        with (
            pytest.raises(DiskError, match=r"/a: the disk is full: 2,000 bytes are needed, 1,000 are free"),
            blaming(path, 2000),
        ):
            raise OSError(code, "No room")
    with pytest.raises(DiskError, match=r"/a: Input/output error$"), blaming(path):
        raise OSError(5, "Input/output error")
    with pytest.raises(DiskError, match=r"/b: inner$"), blaming(path), blaming(tmp_path / "b"):
        raise OSError("inner")


def test_a_file_that_fails_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def half(draft: Path) -> None:
        draft.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match="/a: the disk is full"):
        put(path, half)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_file_systems_that_cannot_sync_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", failing)
    (tmp_path / "a").write_text("1")
    fsync(tmp_path)
    with pytest.raises(DiskError, match="/a: Invalid argument"):
        fsync(tmp_path / "a")


def test_links_and_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("1")
    link_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")

    def failing(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", failing)
    link_file(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "1" and not (tmp_path / "c").samefile(tmp_path / "a")
    with pytest.raises(DiskError, match="/none/d: No such file"):
        copy_file(tmp_path / "a", tmp_path / "none" / "d")


# -- Windows ------------------------------------------------------------------------------------------------------


def test_windows(tmp_path: Path) -> None:
    """No fcntl there, and locks of byte ranges instead; simulated, since this does not run there."""
    code = """
import sys, types
from pathlib import Path
sys.modules["fcntl"] = None
import hf_quant, hf_quant.disk.journal
from hf_quant.disk import locks
from hf_quant.errors import HfQuantError
held = []
def locking(handle, how, count):
    if held:
        raise PermissionError
    held.append(handle)
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
sys.platform = "win32"
file = Path(sys.argv[1])
with locks.locked(file, Path("OUT")):
    assert file.read_text().startswith("pid "), file.read_text()
    try:
        with locks.locked(file, Path("OUT")):
            pass
    except HfQuantError as error:
        print(error)
"""
    made = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], capture_output=True, text=True)
    assert made.stdout.startswith("OUT: another process (pid "), made.stderr
