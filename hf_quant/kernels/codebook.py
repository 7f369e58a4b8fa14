"""Codes that index a table of 16 levels (NF4, FP4), on every device: look up some rows, multiply, go on to the next rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_quant.core.numerics import levels
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._shared.blocks import flat, looked_up, multiply, multiply_back
from hf_quant.kernels._shared.ops import implements


@implements("codebook_linear")
def codebook_linear(x: Tensor, qweight: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """``x [M, K]`` times the portable codes ``[N, K / 2]`` of ``table [16]``: ``[M, N]``."""
    return multiply(x, looked_up(qweight, table), scale, None, 0)


@implements("codebook_linear_backward")
def codebook_linear_backward(grad: Tensor, qweight: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """``grad [M, N]`` times W: ``[M, K]``."""
    return multiply_back(grad, looked_up(qweight, table), scale, None, 0, qweight.shape[1] * 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return codebook_linear_backward(grad, *ctx.saved_tensors), None, None, None


codebook_linear.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True, slots=True)
class CodebookWeight:
    """A weight ``[N, K]`` of indices into a table.

    Attributes:
        qweight: uint8 ``[N, K / 2]``, the portable codes.
        scale: Floating point ``[N, G]``.
        table: float32 ``[16]``, the levels.
    """

    qweight: Tensor
    scale: Tensor
    table: Tensor


class Codebook:
    """The fall-back for codebooks."""

    priority: ClassVar[int] = 10
    repacks: ClassVar[bool] = False

    def why_not(self, spec: LinearSpec) -> str | None:
        return None if spec.scheme.codebook else "codebooks only, no integers"

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> CodebookWeight:
        assert spec.scheme.codebook is not None
        return CodebookWeight(weight.qweight, weight.scale, levels(spec.scheme.codebook, weight.qweight.device))

    def restore(self, prepared: CodebookWeight, spec: LinearSpec) -> Tensor:
        return prepared.qweight

    def linear(self, x: Tensor, prepared: CodebookWeight, spec: LinearSpec) -> Tensor:
        y = codebook_linear(flat(x, spec.in_features), prepared.qweight, prepared.scale, prepared.table)
        return y.reshape(*x.shape[:-1], spec.out_features)


BACKEND = Codebook
