"""Integers of every width on every device: dequantize some rows, multiply, go on to the next rows."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from hf_quant.core.packing import unpack
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._shared.blocks import Codes, flat, multiply, multiply_back
from hf_quant.kernels._shared.ops import implements


def _codes(qweight: Tensor, bits: int) -> Codes:
    return lambda i, j: unpack(qweight[i:j], bits)


@implements("dequant_linear")
def dequant_linear(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``x [M, K]`` times the portable codes ``[N, K / 8 * bits]``: ``[M, N]``."""
    return multiply(x, _codes(qweight, bits), scale, zero, 1 << (bits - 1))


@implements("dequant_linear_backward")
def dequant_linear_backward(grad: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``grad [M, N]`` times W: ``[M, K]``."""
    k = qweight.shape[1] * 8 // bits
    return multiply_back(grad, _codes(qweight, bits), scale, zero, 1 << (bits - 1), k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, scale, zero, ctx.bits = inputs
    ctx.save_for_backward(qweight, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return dequant_linear_backward(grad, *ctx.saved_tensors, ctx.bits), None, None, None, None


dequant_linear.register_autograd(_backward, setup_context=_save)


class Dequant:
    """The fall-back that refuses no integers."""

    priority: ClassVar[int] = 10
    repacks: ClassVar[bool] = False

    def why_not(self, spec: LinearSpec) -> str | None:
        return "integers only, no codebooks" if spec.scheme.codebook else None

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> QuantizedTensor:
        return weight

    def restore(self, prepared: QuantizedTensor, spec: LinearSpec) -> Tensor:
        return prepared.qweight

    def linear(self, x: Tensor, prepared: QuantizedTensor, spec: LinearSpec) -> Tensor:
        rows = flat(x, spec.in_features)
        y = dequant_linear(rows, prepared.qweight, prepared.scale, prepared.zero_point, spec.scheme.bits)
        return y.reshape(*x.shape[:-1], spec.out_features)


BACKEND = Dequant
