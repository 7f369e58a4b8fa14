"""What the process holds of the machine's memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache


def free_memory() -> int:
    """Bytes that could be taken now without swapping."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 4 << 30


@lru_cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


def give_back_memory() -> None:
    """glibc keeps freed working memory between the codes it hands out: a third more than the model itself."""
    if (trim := _malloc_trim()) is not None:
        trim(0)
