"""Locks of processes: on a file of its own, or on a folder for as long as it is in use."""

from __future__ import annotations

import os
import platform
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_quant.disk.atomic import blaming, make_folder
from hf_quant.errors import HfQuantError


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


def lock_folder(folder: Path) -> int | None:
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
