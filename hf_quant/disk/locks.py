"""Locks between processes: on a file, or on a folder while it is in use.

``filelock`` locks files too, but its locks have no owner that a message could name, follow links, and take any file of that
name for a lock, even one of the user's. It cannot lock a folder that is to be renamed. What needs none of that uses it.
"""

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
    """Keep other processes out; the system releases the lock when this process ends, in whatever way.

    Args:
        file: The lock file, removed at the end. One that a dead process has left has no effect.
        what: What is locked, for the message.

    Raises:
        HfQuantError: Another process, which is named, has the lock; the file system has no locks; or a file that is no lock has
            this name, and is left alone.
    """
    make_folder(file.parent)
    handle = _acquire(file, what)
    try:
        with blaming(file):
            os.ftruncate(handle, 0)
            os.write(handle, f"pid {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            file.unlink()
        os.close(handle)


def _acquire(file: Path, what: Path) -> int:
    """Handle of the lock file, locked by this process."""
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
        os.close(handle)  # the last owner has removed the file in the meantime


def _open_lock(file: Path) -> int:
    """Open or create a lock file, but through no link, since its content is replaced."""
    if file.is_symlink():
        raise HfQuantError(f"{file}: is a link, and a lock must be a file of its own: remove it")
    with blaming(file):
        return os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)


def _refuse_strange_lock(file: Path, handle: int) -> None:
    """A lock holds the name of a process, or what a loss of power leaves of it; any other content is a file of the user."""
    text = os.read(handle, 200).strip(b"\0") if stat.S_ISREG(os.fstat(handle).st_mode) else b"?"
    if text[:4] != b"pid "[: len(text)]:
        raise HfQuantError(f"{file}: is in the way: a lock has to be there, and this is something else; move it away")
    os.lseek(handle, 0, os.SEEK_SET)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder until the handle is closed; None where folders have no locks.

    Raises:
        BlockingIOError: Another process has the lock.
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
    """Raises BlockingIOError if another process has the lock."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 30, os.SEEK_SET)  # a locked range cannot be read by others
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            raise BlockingIOError from None
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
