"""Dequantize, then multiply: slow, plain, runs anywhere torch does. What every other backend is compared with."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels._interface import LinearSpec


class Reference:
    """Never chosen by itself; ``HF_QUANT_BACKEND=reference`` asks for it."""

    priority: ClassVar[int] = 0
    repacks: ClassVar[bool] = False

    def why_not(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> tuple[Tensor, ...]:
        return weight.qweight, weight.scale, weight.zeros()

    def restore(self, prepared: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        return prepared[0]

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        qweight, scale, zero = prepared
        return F.linear(x, QuantizedTensor(qweight, scale, zero, spec.scheme).dequantize(x.dtype))


BACKEND = Reference
