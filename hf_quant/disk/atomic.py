"""Files that are written whole or not at all, and stay: whoever is killed, and if the power fails.

A file is written under another name, synced, and renamed, and then its folder is synced. Nothing is synced a second time
where that failed, and every error names the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_quant.errors import DiskError

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
    for old in beside(path, r"[0-9]+(-[0-9a-f]{8})?\.tmp"):
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


def beside(path: Path, ending: str) -> list[Path]:
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
