"""Our own products on CPUs, compiled where a compiler was at hand (``hf_quant/kernels/_native/csrc``), the instruction set chosen at run time.

A few rows are multiplied as fast as memory gives the codes: in float32, or, for bf16 and float16 where there is VNNI, as
integers of 16 bits; many rows on AMX, where W is dequantized to bf16 in the cache (and, for float16 and float32 models, as
a sum of two bf16 numbers, whose products lose nothing that counts beside the codes). Where there is AVX512-BF16 and no AMX,
many rows of bf16 are multiplied by codes that become bf16 in the cache; all other rows, many at a time, by codes that become
float32 there. The threads are PyTorch's. Only x in float64 is left to PyTorch's dense product, some dequantized rows of W at a
time.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.core.private_torch import may_skip_dispatcher
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._native.compiled import (
    TYPES,
    NativeWeight,
    _cpu,
    backward,
    dequantized,
    described,
    laid_out,
    output,
    portable,
    why_not,
)
from hf_quant.kernels._shared.blocks import as_asked, flat
from hf_quant.kernels._shared.ops import implements
from hf_quant.kernels._shared.registration import FLOATS, Arguments


def _product(x: Tensor, weight: bytes) -> Tensor:
    """``x [..., K]`` times what `described` says of a weight; with one row, Python takes several percent of the time."""
    m, y = output(x, weight)
    if x.dtype in TYPES:
        x = x.contiguous()
        _cpu.linear(weight, x.data_ptr(), y.data_ptr(), TYPES[x.dtype], m, torch.get_num_threads())
        return y
    Arguments("cpu_native_linear", x).kind("x", x, FLOATS)
    with as_asked("cpu"):
        for i, j, w in dequantized(weight, x.dtype):
            y[..., i:j] = F.linear(x, w)
    return y


@implements("cpu_native_linear")
def cpu_native_linear(
    x: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, unit: Tensor | None, zero_unit: Tensor | None,
    subtracted: bool, bits: int, n: int,
) -> Tensor:  # fmt: skip
    """``x [M, K]`` times the packed codes: ``[M, N]``.

    Args:
        x: ``[M, K]``.
        tiles: As all that follow but ``n`` as in `NativeWeight`.
        scale: The scales.
        zero: The zero points, or None where all are ``2 ** (bits - 1)``.
        unit: Units of scales in two levels, or None.
        zero_unit: The same of offsets.
        subtracted: Whether ``zero`` is subtracted from scaled codes.
        bits: Width of a code.
        n: N.
    """
    return _product(x, described(tiles, scale, zero, unit, zero_unit, subtracted, bits, n))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, ctx.subtracted, ctx.bits, _ = inputs
    ctx.save_for_backward(*weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return backward(grad, *ctx.saved_tensors, ctx.subtracted, ctx.bits), *[None] * 8


cpu_native_linear.register_autograd(_backward, setup_context=_save)


class CpuNative:
    """Integers of every width in groups of a multiple of 32."""

    priority: ClassVar[int] = 40
    repacks: ClassVar[bool] = True

    def why_not(self, spec: LinearSpec) -> str | None:
        return why_not(spec)

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> NativeWeight:
        return laid_out(weight, spec)

    def restore(self, prepared: NativeWeight, spec: LinearSpec) -> Tensor:
        return portable(prepared.tiles, spec)

    def scales(self, prepared: NativeWeight, spec: LinearSpec) -> dict[str, Tensor]:
        """See `LinearBackend`."""
        return prepared.scales(spec)

    def linear(self, x: Tensor, prepared: NativeWeight, spec: LinearSpec) -> Tensor:
        if may_skip_dispatcher(x):
            return _product(x, prepared.description)
        rows, n = flat(x, spec.in_features), spec.out_features
        y = cpu_native_linear(rows, *prepared.operands, spec.scheme.bits, n)
        return y.reshape(*x.shape[:-1], n)


BACKEND = CpuNative
