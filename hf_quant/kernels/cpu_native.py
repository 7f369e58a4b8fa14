"""Our own products on CPUs, compiled where a compiler was at hand (``hf_quant/kernels/_native/csrc``), the instruction set chosen at run time.

A few rows are multiplied as fast as memory gives the codes: in float32, or, for bf16 and float16 where there is VNNI, as
integers of 16 bits; many rows on AMX, where W is dequantized to bf16 in the cache (and, for float16 and float32 models, as
a sum of two bf16 numbers, whose products lose nothing that counts beside the codes). Where there is AVX512-BF16 and no AMX,
many rows of bf16 are multiplied by codes that become bf16 in the cache. All else is left to PyTorch's dense product, some
dequantized rows of W at a time. The threads are PyTorch's.
"""

from __future__ import annotations

import sys
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
from hf_quant.kernels._shared.blocks import as_asked, compute_dtype, cpu_multiplies_bf16, flat
from hf_quant.kernels._shared.ops import implements
from hf_quant.kernels._shared.registration import FLOATS, Arguments


def _few_rows(dtype: torch.dtype) -> int:
    """Below this many rows our own product is faster than PyTorch's dense one on dequantized rows; with bf16 products of our own, always."""
    if _cpu.level() == "amx" or (_cpu.level() == "bf16" and dtype is torch.bfloat16):
        return sys.maxsize
    if _cpu.level() in ("avx512", "vnni", "bf16"):
        return 32 if dtype is torch.bfloat16 and cpu_multiplies_bf16() else 192
    return 16


def _product(x: Tensor, weight: bytes) -> Tensor:
    """``x [..., K]`` times what `described` says of a weight; with one row, Python takes several percent of the time."""
    m, y = output(x, weight)
    if x.dtype in TYPES and (m == 1 or m < _few_rows(x.dtype)):
        x = x.contiguous()
        _cpu.linear(weight, x.data_ptr(), y.data_ptr(), TYPES[x.dtype], m, torch.get_num_threads())
        return y
    Arguments("cpu_native_linear", x).kind("x", x, FLOATS)
    wide = x.to(compute_dtype(x))
    with as_asked("cpu"):
        for i, j, w in dequantized(weight, wide.dtype):
            y[..., i:j] = F.linear(wide, w)
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
