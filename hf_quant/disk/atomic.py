"""Files that are written completely or not at all, and that survive a kill of the process and a loss of power.

A file is written under a temporary name, synced and renamed, and then its folder is synced. A failed sync is never repeated,
since the system may have dropped the data. Every error names the file.
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

STALE = 3600  # seconds after which a temporary file is taken to be that of a killed process


def write_json(path: Path, obj: Any) -> None:
    """Write ``obj`` to ``path`` as JSON; at any time the file holds either the old or the new text, complete."""
    text = json.dumps(obj, indent=2) + "\n"
    put(Path(path), lambda draft: draft.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``; at any time the file holds either the old or the new bytes, complete."""
    put(Path(path), lambda draft: draft.write_bytes(data))


def put(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace ``path`` by a file that ``write`` fills; when this returns, the new file is on disk.

    Args:
        path: Holds its old or its new content at any time, also after a loss of power.
        write: Writes the file at the path that it receives.

    Raises:
        DiskError: Names ``path``, which still has its old content.
    """
    for old in beside(path, r"[0-9]+(-[0-9a-f]{8})?\.tmp"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE:
                old.unlink()
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # threads share a process id
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
    """Hidden files and folders beside ``path`` named ``.NAME.`` and then as the pattern ``ending`` says."""
    pattern = re.compile(re.escape(f".{path.name}.") + ending)
    with suppress(OSError):
        return [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]
    return []


def link_file(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where the file system has no links."""
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
    """Make a folder and its parents; when this returns, they are on disk.

    Each folder is synced before the next one is made. So it is enough to sync the parent of the first one that exists: the
    process that made it may have been killed before it was on disk.
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
        DiskError: Names ``path``. It is no use to try again: the system may have dropped the data.
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
            raise  # the two exceptions are file systems that cannot sync a folder
    finally:
        os.close(handle)


def need_space(path: Path, nbytes: int) -> None:
    """Refuse to write a file that the disk has no room for.

    Raises:
        DiskError: The disk of ``path`` has fewer than ``nbytes`` bytes free.
    """
    free = shutil.disk_usage(path.parent).free
    if free < nbytes:
        raise DiskError(f"{path}: the disk is full: {nbytes:,} bytes are needed, {free:,} are free")


@contextmanager
def blaming(path: Path, nbytes: int | None = None) -> Iterator[None]:
    """Turn an OSError of the body into a `DiskError` that names the file.

    Args:
        path: The file that is read or written.
        nbytes: Its size when complete, if known.
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = "" if nbytes is None else f"{nbytes:,} bytes are needed, "
            reason = f"the disk is full: {needed}{shutil.disk_usage(path.parent).free:,} are free ({reason})"
        raise DiskError(f"{path}: {reason}") from error
