"""Whether a tensor holds finite numbers only, at the speed of memory where there is a compiled module."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_quant.kernels._native import compiled

CHUNK = 1 << 20  # numbers whose sum is taken at once: a sum in float32 copies them to float32


def all_finite(numbers: Tensor) -> bool:
    """Whether no number of a floating-point tensor is NaN or infinite."""
    if compiled._cpu is not None and numbers.device.type == "cpu" and numbers.dtype in compiled.TYPES:
        flat = numbers.contiguous()
        kind = compiled.TYPES[numbers.dtype]
        return bool(compiled._cpu.finite(flat.data_ptr(), kind, flat.numel(), torch.get_num_threads()))
    return _by_sums(numbers)


def _by_sums(numbers: Tensor) -> bool:
    """The same by PyTorch. A sum that is not finite may be one of large numbers, so these are looked at one by one then."""
    sums = (chunk.sum(dtype=torch.float32) for chunk in numbers.detach().flatten().split(CHUNK))
    return math.isfinite(sum(sums)) or bool(numbers.isfinite().all())
