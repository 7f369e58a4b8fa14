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

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> QuantizedTensor:
        return QuantizedTensor(weight.qweight, weight.scale, weight.zeros(), spec.scheme)

    def restore(self, prepared: QuantizedTensor, spec: LinearSpec) -> Tensor:
        return prepared.qweight

    def linear(self, x: Tensor, prepared: QuantizedTensor, spec: LinearSpec) -> Tensor:
        return F.linear(x, prepared.dequantize(x.dtype))


BACKEND = Reference
