"""INT8 activations times codes of every width on CPUs: the compiled products of bytes, on AMX or VNNI.

The rows of x are rounded as they are laid out for the product, groups are summed up in integers, and scales are applied
before anything is written: one call, no tensor between. Outlier columns are zeros here: their weights are multiplied in
floating point beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.private_torch import may_skip_dispatcher
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._native.compiled import (
    BYTES,
    TYPES,
    NativeWeight,
    _cpu,
    backward,
    built,
    described,
    laid_out,
    output,
    portable,
    why_not,
)
from hf_quant.kernels._shared.blocks import Rounding, flat, rounding
from hf_quant.kernels._shared.ops import implements
from hf_quant.kernels._shared.registration import FLOATS, Arguments


def _product(x: Tensor, weight: bytes, columns: Tensor | None, ranges: Tensor | None) -> Tensor:
    if x.dtype not in TYPES:
        Arguments("cpu_native_int8_linear", x).kind("x", x, FLOATS)
    wide = x.contiguous() if x.dtype in TYPES else x.float().contiguous()
    m, y = output(wide, weight)
    left = None if columns is None else columns.int()
    fixed = None if ranges is None else ranges.float()
    _cpu.int8_linear(
        weight, wide.data_ptr(), y.data_ptr(), TYPES[wide.dtype], m, torch.get_num_threads(),
        0 if left is None else left.data_ptr(), 0 if left is None else left.numel(),
        0 if fixed is None else fixed.data_ptr(),
    )  # fmt: skip
    return y.to(x.dtype)


@implements("cpu_native_int8_linear")
def cpu_native_int8_linear(
    x: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None, ranges: Tensor | None,
    bits: int, n: int,
) -> Tensor:  # fmt: skip
    """``x [M, K]`` rounded to int8, times the packed codes: ``[M, N]``.

    Args:
        x: ``[M, K]``.
        tiles: As the next two as in `NativeWeight`.
        scale: The scales, in one level.
        zero: The zero points, or None where all are ``2 ** (bits - 1)``.
        columns: int16 or int32 ``[C]``, left out; None for none.
        ranges: The scale of all activations, ``[1]``, or None for one of each row.
        bits: Width of a code.
        n: N.
    """
    return _product(x, described(tiles, scale, zero, None, None, False, bits, n), columns, ranges)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.bits = inputs[6]
    ctx.save_for_backward(*inputs[1:4])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """As if activations were not rounded."""
    return backward(grad, *ctx.saved_tensors, None, None, False, ctx.bits), *[None] * 7


cpu_native_int8_linear.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True, slots=True)
class NativeInt8Weight:
    """A weight in the layout of the compiled module, and the grid of its activations.

    Attributes:
        weight: Codes, scales and zero points.
        rounding: How the activations are rounded.
    """

    weight: NativeWeight
    rounding: Rounding


class CpuNativeInt8:
    """INT8 activations, integers of every width in groups of a multiple of 32."""

    priority: ClassVar[int] = 50
    repacks: ClassVar[bool] = True
    int8_activations: ClassVar[bool] = True

    def why_not(self, spec: LinearSpec) -> str | None:
        if spec.scheme.activations == "threshold":
            return "one scale a row or for all, no columns chosen on the way"
        if built() not in (None, *BYTES):
            return f"needs products of bytes (VNNI, or dotprod of ARM), got {built()}"
        return why_not(spec)

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> NativeInt8Weight:
        return NativeInt8Weight(laid_out(weight, spec), rounding(weight))

    def restore(self, prepared: NativeInt8Weight, spec: LinearSpec) -> Tensor:
        return portable(prepared.weight.tiles, spec)

    def scales(self, prepared: NativeInt8Weight, spec: LinearSpec) -> dict[str, Tensor]:
        """See `LinearBackend`."""
        return prepared.weight.scales(spec)

    def linear(self, x: Tensor, prepared: NativeInt8Weight, spec: LinearSpec) -> Tensor:
        weight, grid = prepared.weight, prepared.rounding
        if may_skip_dispatcher(x):
            return _product(x, weight.description, grid.columns, grid.scale)
        rows, bits, n = flat(x, spec.in_features), spec.scheme.bits, spec.out_features
        y = cpu_native_int8_linear(rows, weight.tiles, weight.scale, weight.zero, grid.columns, grid.scale, bits, n)
        return y.reshape(*x.shape[:-1], n)


BACKEND = CpuNativeInt8
