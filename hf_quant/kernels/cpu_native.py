"""Our own products on CPUs, compiled where a compiler was at hand (``hf_quant/csrc``), the instruction set chosen at run time.

A few rows are multiplied in float32, as fast as memory gives the codes; many rows on AMX, where W is dequantized to bf16
in the cache (and, for float16 and float32 models, as a sum of two bf16 numbers, whose products lose nothing that counts
beside the codes). Without AMX, many rows are left to PyTorch's dense product, some dequantized rows of W at a time.
The threads are PyTorch's. HF_QUANT_CPU_LEVEL caps the instruction set: portable, avx2,
avx512, vnni or amx.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.errors import BackendError
from hf_quant.kernels import LinearSpec
from hf_quant.kernels._common import BLOCK, as_asked, compute_dtype, cpu_multiplies_bf16, nobody_looks
from hf_quant.tensor import QuantizedTensor

try:
    from hf_quant.kernels import _cpu
except ImportError:  # it was not built; `why_not` says so
    _cpu = None  # type: ignore[assignment]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LEVELS = ("portable", "avx2", "avx512", "vnni", "amx")

if _cpu is not None and (wanted := os.environ.get("HF_QUANT_CPU_LEVEL")):
    if wanted not in LEVELS:
        raise BackendError(f"HF_QUANT_CPU_LEVEL must be one of {', '.join(LEVELS)}, got {wanted!r}")
    _cpu.limit(wanted)


def built() -> str | None:
    """The instruction set in use; None where nothing was compiled."""
    return None if _cpu is None else _cpu.level()


def _weight(tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int, n: int, k: int) -> tuple[int, ...]:
    """What the module wants to know of a weight."""
    there = 0 if zero is None else zero.data_ptr()
    return tiles.data_ptr(), scale.data_ptr(), there, TYPES[scale.dtype], bits, n, k, k // scale.shape[1]


def _few_rows(dtype: torch.dtype) -> int:
    """Without AMX, below this many rows our own product is faster than PyTorch's dense one on dequantized rows."""
    if _cpu.level() in ("avx512", "vnni"):
        return 32 if dtype is torch.bfloat16 and cpu_multiplies_bf16() else 192
    return 16


def _dequantized(weight: tuple[int, ...], dtype: torch.dtype) -> Any:
    """``(i, j, W[i:j])`` for some rows after others; bf16 if ``dtype`` is that, else float32 cast to ``dtype``."""
    n, k = weight[5:7]
    own = dtype if dtype is torch.bfloat16 else torch.float32
    rows = max(1, BLOCK // k // 16) * 16
    for i in range(0, n, rows):
        j = min(i + rows, n)
        w = torch.empty(j - i, k, dtype=own)
        _cpu.dequantize(*weight, i // 16, (j + 15) // 16, w.data_ptr(), TYPES[own], torch.get_num_threads())
        yield i, j, w.to(dtype)


def _product(x: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int, n: int) -> Tensor:
    m, k = x.shape
    y = x.new_empty(m, n)
    weight = _weight(tiles, scale, zero, bits, n, k)
    if x.dtype in TYPES and (_cpu.level() == "amx" or m < _few_rows(x.dtype)):
        x = x.contiguous()
        _cpu.linear(*weight, x.data_ptr(), y.data_ptr(), TYPES[x.dtype], m, torch.get_num_threads())
        return y
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    with as_asked("cpu"):
        for i, j, w in _dequantized(weight, dtype):
            y[:, i:j] = F.linear(wide, w)
    return y


@torch.library.custom_op("hf_quant::cpu_native_linear", mutates_args=(), device_types="cpu")
def cpu_native_linear(x: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int, n: int) -> Tensor:
    """``x [M, K]`` times the packed codes: ``[M, N]``.

    Args:
        x: ``[M, K]``.
        tiles: uint8 ``[ceil(N / 16), K / 32, 64 bits]``, the layout of ``csrc/cpu.h``.
        scale: float32 or bf16 ``[ceil(N / 16), G, 16]``.
        zero: Zero points like ``scale``, or None where all are ``2 ** (bits - 1)``.
        bits: Width of a code.
        n: N.
    """
    return _product(x, tiles, scale, zero, bits, n)


@torch.library.custom_op("hf_quant::cpu_native_linear_backward", mutates_args=(), device_types="cpu")
def cpu_native_linear_backward(grad: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``grad [M, N]`` times W: ``[M, K]``; blocks of W are added up in float32 at least."""
    k = tiles.shape[1] * 32
    dtype = compute_dtype(grad)
    out = grad.new_zeros(grad.shape[0], k, dtype=torch.promote_types(dtype, torch.float32))
    wide = grad.to(dtype)
    with as_asked("cpu"):
        for i, j, w in _dequantized(_weight(tiles, scale, zero, bits, grad.shape[1], k), dtype):
            out += wide[:, i:j] @ w
    return out.to(grad.dtype)


@cpu_native_linear.register_fake
def _(x: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int, n: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


@cpu_native_linear_backward.register_fake
def _(grad: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    return grad.new_empty(grad.shape[0], tiles.shape[1] * 32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tiles, scale, zero, ctx.bits, _ = inputs
    ctx.save_for_backward(tiles, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return cpu_native_linear_backward(grad, *ctx.saved_tensors, ctx.bits), None, None, None, None, None


cpu_native_linear.register_autograd(_backward, setup_context=_save)


def _in_blocks(values: Tensor) -> Tensor:
    """``[N, G]`` to ``[ceil(N / 16), G, 16]``, float32 or bf16."""
    n, g = values.shape
    dtype = torch.bfloat16 if values.dtype is torch.bfloat16 else torch.float32
    padded = values.new_zeros((n + 15) // 16 * 16, g, dtype=dtype)
    padded[:n] = values
    return padded.view(-1, 16, g).transpose(1, 2).contiguous()


class CpuNative:
    """Integers of every width in groups of a multiple of 32."""

    priority: ClassVar[int] = 40
    repacks: ClassVar[bool] = True

    def why_not(self, spec: LinearSpec) -> str | None:
        if spec.device != "cpu":
            return f"needs a CPU, got {spec.device}"
        if _cpu is None:
            return "not compiled: there was no C++ compiler when hf_quant was installed"
        if spec.dtype not in TYPES:
            return f"float32 at most, too coarse for {spec.dtype}"
        if spec.scheme.codebook:
            return "integers only, no codebooks"
        if spec.in_features // spec.scheme.groups(spec.in_features) % 32:
            return f"group size {spec.scheme.group_size} is not a multiple of 32"
        return None

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> tuple[Tensor, ...]:
        n, k, bits = spec.out_features, spec.in_features, spec.scheme.bits
        codes = weight.qweight.contiguous()
        tiles = codes.new_empty((n + 15) // 16, k // 32, 64 * bits)
        _cpu.pack(codes.data_ptr(), tiles.data_ptr(), bits, n, k, torch.get_num_threads())
        scale, zero = weight.scale, weight.zero_point
        if zero is None:
            return tiles, _in_blocks(scale)
        if zero.is_floating_point():  # of another dtype, maybe; integers up to 255 are exact in all of them
            scale, zero = (t.to(torch.promote_types(scale.dtype, zero.dtype)) for t in (scale, zero))
        return tiles, _in_blocks(scale), _in_blocks(zero.to(scale.dtype))

    def restore(self, prepared: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        n, k, bits = spec.out_features, spec.in_features, spec.scheme.bits
        codes = prepared[0].new_empty(n, k // 8 * bits)
        _cpu.unpack(prepared[0].data_ptr(), codes.data_ptr(), bits, n, k, torch.get_num_threads())
        return codes

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        zero = prepared[2] if len(prepared) == 3 else None
        product = _product if nobody_looks(x) else cpu_native_linear
        y = product(
            x.reshape(-1, spec.in_features), prepared[0], prepared[1], zero, spec.scheme.bits, spec.out_features
        )
        return y.reshape(*x.shape[:-1], spec.out_features)


BACKEND = CpuNative
