"""In which types scales and zero points lie in the layout of the compiled module: the smallest that hold them to the last bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.core.numerics import same_bits
from hf_quant.core.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales and zero points of a weight ``[N, K]``.

    Attributes:
        scale: float32, bf16 or float16 ``[N, G]``, uint8 in two levels; float32 ``[1]`` if there is one for the whole weight.
        zero: Zero points ``[N, G]``, uint8 if they are integers; in two levels offsets; None for a symmetric scheme.
        subtracted: Whether ``zero`` is subtracted from scaled codes, not from codes.
    """

    scale: Tensor
    zero: Tensor | None
    subtracted: bool = False

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Scales:
        """Those of ``weight``."""
        if weight.coded is not None:
            return cls(weight.coded.code, weight.coded.offset, weight.coded.offset is not None)
        scale, zero = _narrow(weight.scale), weight.zero_point
        if zero is None:
            alone = scale.shape[1] == 1 and same_bits(scale, scale[:1].expand_as(scale))
            return cls(scale[0].float() if alone else scale, None)
        if zero.is_floating_point():
            zero = _narrow(zero)
            if zero.dtype is torch.float32 and weight.scheme.activations is None:
                offset = _subtrahend(zero, scale)
                return cls(scale, zero if offset is None else offset, offset is not None)
        return cls(scale, zero)


def _narrow(values: Tensor) -> Tensor:
    """Floating-point numbers in 16 bits if they are the same there, else in float32."""
    if values.dtype in (torch.float16, torch.bfloat16):
        return values
    wide = values.float()
    for dtype in (torch.float16, torch.bfloat16):
        if same_bits((half := wide.to(dtype)).float(), wide):
            return half
    return wide


def _subtrahend(zero: Tensor, scale: Tensor) -> Tensor | None:
    """float16 ``[N, G]`` whose quotients by ``scale`` are ``zero`` to the last bit, as in Q4_1 of GGUF; None if there is none."""
    wide = scale.float()
    offset = (zero * wide).half()
    return offset if same_bits(offset.float() / wide, zero) else None
