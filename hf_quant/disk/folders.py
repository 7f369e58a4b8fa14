"""Folders that appear completely or not at all.

A folder is written under a temporary name, synced file by file, and renamed; what a killed process has left is removed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_quant.disk.atomic import beside, blaming, fsync, make_folder
from hf_quant.disk.locks import lock_folder
from hf_quant.errors import CheckpointError


@contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into: it becomes ``out`` if the body succeeds, and is removed if it fails.

    Such folders that killed processes have left are removed too.

    Args:
        out: The result. At any time it is either the old folder or the new one, complete.
        overwrite: Whether ``out`` may exist and hold files, all of which are replaced.

    Raises:
        CheckpointError: ``out`` is a file, or a folder that is not empty and may not be overwritten.
        DiskError: Names the file that could not be written.
    """
    out = Path(os.path.realpath(out))
    clear(out)
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is not a folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out}: exists and is not empty; overwrite=True replaces it")
    make_folder(out.parent)
    stage, handle = _stage(out)
    try:
        yield stage
        mode = stat.S_IMODE(stage.stat().st_mode) & 0o666  # as the umask says; some libraries write for the owner only
        for folder, _, files in os.walk(stage, topdown=False):
            for file in files:
                with blaming(Path(folder, file)):
                    Path(folder, file).chmod(mode)
                fsync(Path(folder, file))
            fsync(Path(folder))
        _swap(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # after a swap it holds the old folder
        if handle is not None:
            os.close(handle)


def discard(folder: Path, out: Path) -> None:
    """Remove a folder beside ``out`` atomically: what an interrupted removal leaves, the next `staged` removes."""
    aside = _hidden(out)
    with blaming(folder):
        folder.rename(aside)
    fsync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _hidden(out: Path, kind: str = "stage") -> Path:
    return out.with_name(f".{out.name}.{kind}-{secrets.token_hex(4)}")


def _stage(out: Path) -> tuple[Path, int | None]:
    """A new folder, locked while the handle is open, so that others can tell that it is in use."""
    while True:
        stage = _hidden(out)
        with blaming(stage):
            stage.mkdir()
        try:
            handle = lock_folder(stage)
        except (BlockingIOError, FileNotFoundError):  # another process took it for an abandoned one
            continue
        if stage.exists():
            return stage, handle


def clear(out: Path) -> None:
    """Remove the abandoned stages beside ``out``, and undo or finish a swap that was made without `_exchange`."""
    for old in beside(out, "before-[0-9a-f]{8}"):
        if not out.exists():
            old.rename(out)
    for left in beside(out, "(stage|before)-[0-9a-f]{8}"):
        with suppress(OSError):
            handle = lock_folder(left)
            if handle is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)


def _swap(stage: Path, out: Path) -> None:
    """Let ``stage`` become ``out``; an old ``out`` takes its place or is gone."""
    with blaming(out):
        if not out.exists():
            stage.rename(out)
        elif not _exchange(stage, out):
            old = _hidden(out, "before")
            out.rename(old)
            try:
                stage.rename(out)
            except BaseException:
                old.rename(out)
                raise
            old.rename(stage)
    fsync(out.parent)


def _exchange(one: Path, two: Path) -> bool:
    """Let two folders exchange their names atomically; False if this system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    current_folder, flags = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(current_folder, os.fsencode(one), current_folder, os.fsencode(two), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(two))
