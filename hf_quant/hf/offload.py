"""Modules whose weights accelerate offloads, and loads only while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import align_module_device
from torch import nn


def is_away(module: nn.Module) -> bool:
    """Whether some parameters of the module itself are offloaded."""
    return any(p.device.type == "meta" for p in module.parameters(recurse=False))


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of the module itself are in memory."""
    if not is_away(module):
        yield
        return
    with align_module_device(module, "cpu"):
        yield
