"""Writing is all or nothing; what that means when the power fails is in test_crash.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_quant import disk
from hf_quant.disk import staged, write_json
from hf_quant.errors import CheckpointError


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

    monkeypatch.setattr(disk, "_exchange", lambda *_: False)
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
