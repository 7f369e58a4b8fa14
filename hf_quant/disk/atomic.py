"""Files and folders that are written whole or not at all, and stay: whoever is killed, and if the power fails.

A file is written under another name, synced, and renamed, and then its folder is synced; a folder likewise. Nothing is
synced a second time where that failed, and every error names the file.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_quant.errors import CheckpointError, DiskError, HfQuantError

STALE = 3600  # seconds after which a file that is being written belongs to a process that was killed


def write_json(path: Path, obj: Any) -> None:
    """Write ``obj`` to ``path``, which at any time holds the old text or the new one, never half of it."""
    text = json.dumps(obj, indent=2) + "\n"
    put(Path(path), lambda draft: draft.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, likewise."""
    put(Path(path), lambda draft: draft.write_bytes(data))


def put(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill another file, and put that in the place of ``path``; when this returns, it stays.

    Args:
        path: At any time it is what it was, or what is written now, also after a loss of power.
        write: Writes the file that it is given the path of.

    Raises:
        DiskError: Names ``path``, which is what it was.
    """
    for old in _beside(path, r"[0-9]+(-[0-9a-f]{8})?\.tmp"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE:
                old.unlink()
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # threads share the first number
    try:
        with blaming(path):
            write(draft)
            fsync(draft)
            draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    fsync(path.parent)


def _beside(path: Path, ending: str) -> list[Path]:
    """Hidden files and folders beside ``path`` that are called ``.NAME.`` and then as the pattern ``ending`` says."""
    pattern = re.compile(re.escape(f".{path.name}.") + ending)
    with suppress(OSError):
        return [each for each in path.parent.iterdir() if pattern.fullmatch(each.name)]
    return []


def link_file(source: Path, target: Path) -> None:
    """Let ``target`` be the same file, or a copy where the file system has no links."""
    try:
        target.hardlink_to(source)
    except OSError:
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file.

    Raises:
        DiskError: Names ``target``.
    """
    with blaming(target, source.stat().st_size):
        shutil.copyfile(source, target)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it; when this returns, they stay.

    Each is on disk before the next is made, so that it is enough to look one above what is there already: whoever made
    that may have been killed before it was on disk.
    """
    if folder.is_dir():
        with suppress(PermissionError):
            fsync(folder.parent)
        return
    make_folder(folder.parent)
    with blaming(folder):
        folder.mkdir(exist_ok=True)
    fsync(folder.parent)


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk.

    Raises:
        DiskError: Names ``path``. Trying again would tell nothing: the system may have forgotten what it could not write.
    """
    folder = path.is_dir()
    if os.name == "nt" and folder:  # Windows cannot open a folder, and does not need to
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        with blaming(path):
            os.fsync(handle)
    except DiskError as error:
        if not (folder and getattr(error.__cause__, "errno", None) in (errno.EINVAL, errno.ENOTSUP)):
            raise  # those two: a file system that knows no such thing
    finally:
        os.close(handle)


def need_space(path: Path, nbytes: int) -> None:
    """Refuse to begin writing what cannot be finished.

    Raises:
        DiskError: Where ``path`` shall be there are fewer than ``nbytes`` bytes free.
    """
    free = shutil.disk_usage(path.parent).free
    if free < nbytes:
        raise DiskError(f"{path}: the disk is full: {nbytes:,} bytes are needed, {free:,} are free")


@contextmanager
def blaming(path: Path, nbytes: int | None = None) -> Iterator[None]:
    """Turn an OSError of the body into a `DiskError`: those of read, write and fsync do not say which file it was.

    Args:
        path: What is being read or written.
        nbytes: How large it will be, where that is known.
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        said = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = "" if nbytes is None else f"{nbytes:,} bytes are needed, "
            said = f"the disk is full: {needed}{shutil.disk_usage(path.parent).free:,} are free ({said})"
        raise DiskError(f"{path}: {said}") from error


# -- folders that appear whole ------------------------------------------------------------------------------------


@contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` if the body succeeds, and vanishes if it does not.

    What processes that were killed have left behind of such folders vanishes too.

    Args:
        out: Where the result shall be. At any time it is what it was, or whole.
        overwrite: Whether ``out`` may exist and hold something; all of that is then replaced.

    Raises:
        CheckpointError: ``out`` is a file, or a folder that is not empty and may not be overwritten.
        DiskError: Names what could not be written.
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
        mode = (
            stat.S_IMODE(stage.stat().st_mode) & 0o666
        )  # what the umask leaves; some libraries write for the owner only
        for folder, _, files in os.walk(stage, topdown=False):
            for file in files:
                with blaming(Path(folder, file)):
                    Path(folder, file).chmod(mode)
                fsync(Path(folder, file))
            fsync(Path(folder))
        _swap(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # after a swap, what was there before
        if handle is not None:
            os.close(handle)


def discard(folder: Path, out: Path) -> None:
    """Remove a folder beside ``out`` in one step: what is left if that is interrupted, the next `staged` clears away."""
    aside = _hidden(out)
    with blaming(folder):
        folder.rename(aside)
    fsync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _hidden(out: Path, kind: str = "stage") -> Path:
    return out.with_name(f".{out.name}.{kind}-{secrets.token_hex(4)}")


def _stage(out: Path) -> tuple[Path, int | None]:
    """A new folder, locked for as long as the handle is open: that tells others that it is in use."""
    while True:
        stage = _hidden(out)
        with blaming(stage):
            stage.mkdir()
        try:
            handle = _flock(stage)
        except (BlockingIOError, FileNotFoundError):  # somebody clears up, and took it for one that was left behind
            continue
        if stage.exists():
            return stage, handle


def clear(out: Path) -> None:
    """Remove the stages beside ``out`` that nobody works in, and undo or finish a swap without `_exchange`."""
    for old in _beside(out, "before-[0-9a-f]{8}"):
        if not out.exists():
            old.rename(out)
    for left in _beside(out, "(stage|before)-[0-9a-f]{8}"):
        with suppress(OSError):
            handle = _flock(left)
            if handle is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)


def _swap(stage: Path, out: Path) -> None:
    """Let ``stage`` become ``out``, and leave what was there before, if anything, in its place or nowhere."""
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
    """Let two folders take each other's name in one step; False if this system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(two))


# -- locks --------------------------------------------------------------------------------------------------------


@contextmanager
def locked(file: Path, what: Path) -> Iterator[None]:
    """Keep other processes out; the system lets go of the lock when this one ends, however it ends.

    Args:
        file: The lock; removed at the end. One that a dead process has left means nothing.
        what: What it is for, for the message.

    Raises:
        HfQuantError: Another process, which is named, has the lock; it cannot be had on this file system; or there is
            something else of that name, which is left alone.
    """
    make_folder(file.parent)
    handle = _own(file, what)
    try:
        with blaming(file):
            os.ftruncate(handle, 0)
            os.write(handle, f"pid {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            file.unlink()
        os.close(handle)


def _own(file: Path, what: Path) -> int:
    """Handle of the lock, once it is ours."""
    while True:
        handle = _open_lock(file)
        try:
            _lock(handle)
            if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
                _refuse_strange_lock(file, handle)
                return handle
        except BlockingIOError:
            who = os.read(handle, 200).decode(errors="replace") or "which did not say its name yet"
            os.close(handle)
            raise HfQuantError(f"{what}: another process ({who}) works there") from None
        except HfQuantError:
            os.close(handle)
            raise
        except OSError as error:
            os.close(handle)
            raise HfQuantError(f"{file}: cannot be locked: {error.strerror}") from None
        os.close(handle)  # whoever had it removed the file in between


def _open_lock(file: Path) -> int:
    """Open the file of a lock, or make it; through no link, since whatever is there will be replaced."""
    if file.is_symlink():
        raise HfQuantError(f"{file}: is a link, and a lock must be a file of its own: remove it")
    with blaming(file):
        return os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)


def _refuse_strange_lock(file: Path, handle: int) -> None:
    """A file that holds anything but the name of a process, or what a loss of power leaves of it, is not a lock."""
    text = os.read(handle, 200).strip(b"\0") if stat.S_ISREG(os.fstat(handle).st_mode) else b"?"
    if text[:4] != b"pid "[: len(text)]:
        raise HfQuantError(f"{file}: is in the way: a lock has to be there, and this is something else; move it away")
    os.lseek(handle, 0, os.SEEK_SET)


def _flock(folder: Path) -> int | None:
    """Lock a folder until the handle is closed; None where folders cannot be locked.

    Raises:
        BlockingIOError: Somebody else has the lock.
    """
    if os.name == "nt":
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # some network file systems
        os.close(handle)
        return None
    return handle


def _lock(handle: int) -> None:
    """Raises BlockingIOError if somebody else has the lock."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 30, os.SEEK_SET)  # nobody could read what is locked there
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            raise BlockingIOError from None
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
