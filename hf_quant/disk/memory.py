"""The memory that this process may still take, and memory that it can return."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import ClassVar

import psutil

EXHAUSTED = re.compile(
    r"out of memory|can(no|')t allocate memory|can't start new thread|not enough memory|Resource temporarily unavailable",
    re.IGNORECASE,
)
CGROUPS, MEMBERSHIP = (
    Path("/sys/fs/cgroup"),
    Path("/proc/self/cgroup"),
)  # limits of containers, and the groups of this process
# limit, usage, and the part of it that is reclaimable cache: in versions 2 and 1
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int:
    """Bytes that could be allocated without swapping, within the limits of the container.

    The page cache counts as free, since the system gives it up.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_in_containers()]))


def exhausted(error: BaseException) -> str | None:
    """A sentence if the machine, or a limit on this process, gives no more memory or threads; None for other errors.

    Python has one class for that; libraries in other languages raise their own, some of which are no `Exception`.
    """
    text = str(error)
    if not isinstance(error, MemoryError) and not EXHAUSTED.search(text):
        return None
    about = f" ({text.splitlines()[0][:200]})" if text else ""
    return f"out of memory, or of threads: the system gives this process no more{about}"


def _left_in_containers(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[int]:
    """The memory that each control group of this process, and each group above it, has left."""
    for folder in _groups(root, membership):
        for limit, use, cache in FILES:
            allowed, used = _number(folder / limit), _number(folder / use)
            if allowed is not None and used is not None:
                yield allowed - used + _statistic(folder / "memory.stat", cache)


def _groups(root: Path, membership: Path) -> list[Path]:
    """Folders of the groups; in a container, the path that the process is told may be one outside of it."""
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return []
    folders: list[Path] = []
    for line in lines:
        kinds, _, path = line.partition(":")[2].partition(":")
        if kinds == "" or "memory" in kinds.split(","):
            group = PurePosixPath(path.lstrip("/"))
            top = root / "memory" if kinds else root
            folders += [top / member for member in (group, *group.parents) if ".." not in member.parts]
    return list(dict.fromkeys(folders))


def _number(path: Path) -> int | None:
    """The number in a file; None if that is ``max`` or there is no file."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        entries = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
        return next((int(entry[1]) for entry in entries if entry[0] == name), 0)
    except (OSError, ValueError, IndexError):
        return 0


class _Heap(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@lru_cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    if hasattr(library, "mallinfo2"):  # since 2.33
        library.mallinfo2.restype = _Heap
    return library if hasattr(library, "malloc_trim") else None


def give_back_memory(least: int = 0) -> None:
    """Return freed memory to the system: between two codes, glibc keeps a third more than the size of the model.

    Args:
        least: Bytes from which on it is worth the time to get them again.
    """
    glibc = _glibc()
    if glibc is not None and (least == 0 or (hasattr(glibc, "mallinfo2") and glibc.mallinfo2().fordblks >= least)):
        glibc.malloc_trim(0)
