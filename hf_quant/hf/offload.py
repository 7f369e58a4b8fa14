"""Modules whose weights accelerate keeps elsewhere, and brings in only while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import align_module_device
from torch import nn


def is_away(module: nn.Module) -> bool:
    """Whether some of its own parameters are not in memory."""
    return any(p.device.type == "meta" for p in module.parameters(recurse=False))


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """With its own parameters in memory."""
    if not is_away(module):
        yield
        return
    with align_module_device(module, "cpu"):
        yield
