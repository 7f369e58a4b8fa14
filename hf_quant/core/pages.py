"""Memory for large tensors that loading makes, in large pages where the system has them: small ones take as long to get as to fill."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_quant import _upwards


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized contiguous tensor."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    room: Tensor = _upwards.compiled().scratch(math.prod(shape) * dtype.itemsize)
    return room.view(dtype).view(shape)
