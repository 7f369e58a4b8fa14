"""W8A8 and W4A8 on integer tensor cores: activations are rounded row by row, products added up in int32.

Few rows are rounded inside the product's kernel, each program for itself (they stay in the L2 cache); many by a kernel of
their own. Weights are the first operand, so that what unpacks them feeds the tensor cores from registers. Four-bit codes
stand two in a byte, so activations are read (or stored) as two planes: columns of even and of odd number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.packing import unpack
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._shared.blocks import Rounding, flat, multiply, multiply_back, rounding
from hf_quant.kernels._shared.ops import implements
from hf_quant.kernels._shared.rounded import round_activations
from hf_quant.kernels._triton.fallback import launched
from hf_quant.kernels._triton.tiles import too_old, why_no_triton

FUSED_ROWS = 16  # so many rows are rounded inside the product
FEW_ROWS = 32  # multiplied in tiles of few rows
FEW, MANY, GROUPED = (16, 64, 128), (128, 128, 128), (64, 128, 128)  # BLOCK_M, BLOCK_N, BLOCK_K
WARPS, STAGES = 4, 3
MOST = 131072  # columns: 127 * 128 * K stays inside int32

if why_no_triton() is None:
    import triton
    import triton.language as tl

    @triton.jit
    def rounded(x, scale):
        """int8 codes of ``x`` for a scale that broadcasts."""
        return tl.minimum(tl.maximum(tl.floor(x / scale + 0.5), -127.0), 127.0).to(tl.int8)

    @triton.jit
    def round_kernel(
        x_ptr, kept_ptr, range_ptr, q_ptr, scale_ptr, K,
        HAS_KEPT: tl.constexpr, STATIC: tl.constexpr, PLANES: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """q int8 [M, K], scale [M] of one row of x; columns of number p modulo PLANES go to the p-th part of the row."""
        row = tl.program_id(0).to(tl.int64) * K
        peak = tl.zeros((BLOCK_K,), dtype=tl.float32)
        nothing = tl.zeros((BLOCK_K,), dtype=tl.float32)  # NaN where a value is not finite
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + row + k, mask=k < K, other=0.0).to(tl.float32)
            if HAS_KEPT:
                x *= tl.load(kept_ptr + k, mask=k < K, other=0).to(tl.float32)
            peak = tl.maximum(peak, tl.abs(x))
            nothing += x * 0
        scale = tl.load(range_ptr).to(tl.float32) if STATIC else tl.maximum(tl.max(peak, 0), 1.5e-36) / 127
        tl.store(scale_ptr + tl.program_id(0), scale + tl.sum(nothing, 0))
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + row + k, mask=k < K, other=0.0).to(tl.float32)
            if HAS_KEPT:
                x *= tl.load(kept_ptr + k, mask=k < K, other=0).to(tl.float32)
            at = (k % PLANES) * (K // PLANES) + k // PLANES
            tl.store(q_ptr + row + at, rounded(x, scale), mask=k < K)

    @triton.jit
    def row_scales(
        x_ptr, kept_ptr, range_ptr, m, M, K,
        HAS_KEPT: tl.constexpr, STATIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """Scale ``[BLOCK_M]`` of some rows, and what is NaN where a row is not finite, else 0."""
        peak = tl.zeros((BLOCK_M,), dtype=tl.float32)
        nothing = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            ok = (m < M)[None, :] & (k < K)[:, None]
            x = tl.load(x_ptr + m[None, :].to(tl.int64) * K + k[:, None], mask=ok, other=0.0).to(tl.float32)
            if HAS_KEPT:
                x *= tl.load(kept_ptr + k, mask=k < K, other=0).to(tl.float32)[:, None]
            peak = tl.maximum(peak, tl.max(tl.abs(x), 0))
            nothing += tl.sum(x * 0, 0)
        scale = peak * 0 + tl.load(range_ptr).to(tl.float32) if STATIC else tl.maximum(peak, 1.5e-36) / 127
        return scale, nothing

    @triton.jit
    def inputs(
        x_ptr, kept_ptr, scale, m, k, first, step, M, K, width, FUSED: tl.constexpr, HAS_KEPT: tl.constexpr
    ):  # fmt: skip
        """int8 ``[BLOCK_K, BLOCK_M]``: columns ``first + step * k`` of float rows, or columns ``first + k`` of codes."""
        column = first + step * k
        ok = (m < M)[None, :] & (k < width)[:, None]
        x = tl.load(x_ptr + m[None, :].to(tl.int64) * K + column[:, None], mask=ok, other=0)
        if FUSED:
            wide = x.to(tl.float32)
            if HAS_KEPT:
                wide *= tl.load(kept_ptr + column, mask=k < width, other=0).to(tl.float32)[:, None]
            x = rounded(wide, scale[None, :])
        return x

    @triton.jit
    def int8_kernel(
        x_ptr, kept_ptr, range_ptr, q_ptr, scale_ptr, zero_ptr, y_ptr, M, N, K, G, GROUP,
        BITS: tl.constexpr, HAS_ZERO: tl.constexpr, IN_GROUPS: tl.constexpr, FUSED: tl.constexpr,
        HAS_KEPT: tl.constexpr, STATIC: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """y[M, N] = (x[M, K] @ ((q[N, K] - zero[N, G]) * scale[N, G]).T) * range[M].

        FUSED: x in floating point, range[1] its scale or, not STATIC, unused. Else x int8 in as many planes as a byte has
        codes. IN_GROUPS: BLOCK_K divides GROUP.
        """
        PLANES: tl.constexpr = 8 // BITS
        STEP: tl.constexpr = BLOCK_K // PLANES  # bytes
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_ok, n_ok = m < M, n < N
        if FUSED:
            sx, nothing = row_scales(x_ptr, kept_ptr, range_ptr, m, M, K, HAS_KEPT, STATIC, BLOCK_M, BLOCK_K)
        else:
            sx, nothing = tl.load(range_ptr + m, mask=m_ok, other=0.0), tl.zeros((BLOCK_M,), dtype=tl.float32)
        width = K // PLANES
        q_row = q_ptr + n[:, None].to(tl.int64) * width
        g_row = n.to(tl.int64) * G
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
        for b0 in range(0, width, STEP):
            b = b0 + tl.arange(0, STEP)
            byte = tl.load(q_row + b[None, :], mask=n_ok[:, None] & (b < width)[None, :], other=0)
            g = b0 * PLANES // GROUP
            if IN_GROUPS:
                acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
            if BITS == 8:
                x = inputs(x_ptr, kept_ptr, sx, m, b, 0, 1, M, K, width, FUSED, HAS_KEPT)
                acc = tl.dot((byte ^ 128).to(tl.int8, bitcast=True), x, acc, out_dtype=tl.int32)
            else:
                if HAS_ZERO:
                    zero = tl.load(zero_ptr + g_row + g, mask=n_ok, other=0).to(tl.int8)[:, None]
                else:
                    zero = tl.full((BLOCK_N, 1), 8, dtype=tl.int8)
                even = inputs(x_ptr, kept_ptr, sx, m, b, 0, 2 if FUSED else 1, M, K, width, FUSED, HAS_KEPT)
                low = (byte & 15).to(tl.int8) - zero
                acc = tl.dot(low, even, acc, out_dtype=tl.int32)
                odd = inputs(
                    x_ptr, kept_ptr, sx, m, b, 1 if FUSED else width, 2 if FUSED else 1, M, K, width, FUSED, HAS_KEPT
                )
                acc = tl.dot((byte >> 4).to(tl.int8) - zero, odd, acc, out_dtype=tl.int32)
            if IN_GROUPS:
                scale = tl.load(scale_ptr + g_row + g, mask=n_ok, other=0.0).to(tl.float32)
                total += acc.to(tl.float32) * scale[:, None]
        if not IN_GROUPS:
            scale = tl.load(scale_ptr + g_row, mask=n_ok, other=0.0).to(tl.float32)
            total = acc.to(tl.float32) * scale[:, None]
        y = tl.trans(total * (sx + nothing)[None, :])
        at = m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


@implements("triton_int8")
def triton_int8(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: Tensor | None,
    input_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """``x [M, K]`` rounded to int8, times the portable codes ``[N, K / 8 * bits]``: ``[M, N]``.

    Args:
        x: ``[M, K]``.
        qweight: uint8, of 8 or 4 bits.
        scale: ``[N, G]``.
        zero: uint8 ``[N, G]``, of 4 bits only; None for the middle.
        bits: 8 or 4.
        columns: int16 or int32 ``[C]``, left out; None for none.
        input_scale: ``[1]``, or None for one of each row.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, scale.shape[0])
    arguments = x, qweight, scale, zero, bits, columns, input_scale
    size = x.shape[1] // scale.shape[1]
    blocks = x.shape[0] <= FUSED_ROWS, x.shape[0] <= FEW_ROWS, scale.shape[1] == 1, size
    return launched(
        ("triton_int8", bits, x.dtype, blocks, x.device),
        partial(launch, *arguments),
        partial(_in_floating_point, *arguments),
    )


def launch(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: Tensor | None,
    input_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The product of `triton_int8` by its kernel."""
    x = x.contiguous()
    (m, k), (n, groups) = x.shape, scale.shape
    y = x.new_empty(m, n)
    kept = None if columns is None else x.new_ones(k, dtype=torch.uint8).index_fill_(0, columns.long(), 0)
    fused = m <= FUSED_ROWS
    size = k // groups
    block_m, block_n, block_k = FEW if m <= FEW_ROWS else MANY if groups == 1 else GROUPED
    block_k = block_k if groups == 1 else min(block_k, size)
    with torch.cuda.device_of(x):
        rows, ranges = x, input_scale
        if not fused:
            rows, ranges = x.new_empty(m, k, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
            round_kernel[(m,)](
                x, kept, input_scale, rows, ranges, k,
                HAS_KEPT=kept is not None, STATIC=input_scale is not None, PLANES=8 // bits, BLOCK_K=1024,
            )  # fmt: skip
        int8_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
            rows, kept, ranges, qweight.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous(), y,
            m, n, k, groups, size, BITS=bits, HAS_ZERO=zero is not None, IN_GROUPS=groups > 1, FUSED=fused,
            HAS_KEPT=kept is not None, STATIC=input_scale is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=2 * WARPS if block_m > 16 else WARPS, num_stages=STAGES,
        )  # fmt: skip
    return y


def _in_floating_point(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: Tensor | None,
    input_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The product of `triton_int8` by rows rounded to their grid and the dequantized weight."""
    rows = round_activations(x, columns, input_scale, 0.0)
    return multiply(rows, lambda i, j: unpack(qweight[i:j], bits), scale, zero, 1 << (bits - 1))


@implements("triton_int8_backward")
def triton_int8_backward(grad: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``grad [M, N]`` times W: ``[M, K]``, as if activations were not rounded; dequantized block by block in PyTorch."""
    k = qweight.shape[1] * 8 // bits
    return multiply_back(grad, lambda i, j: unpack(qweight[i:j], bits), scale, zero, 1 << (bits - 1), k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, scale, zero, ctx.bits, _, _ = inputs
    ctx.save_for_backward(qweight, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return triton_int8_backward(grad, *ctx.saved_tensors, ctx.bits), None, None, None, None, None, None


triton_int8.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True, slots=True)
class TritonInt8Weight:
    """A weight ``[N, K]`` in portable codes, and the grid of its activations.

    Attributes:
        qweight: uint8 ``[N, K / 8 * bits]``.
        scale: Floating point ``[N, G]``.
        zero: uint8 ``[N, G]``, or None where the scheme is symmetric.
        rounding: How the activations are rounded.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor | None
    rounding: Rounding


class TritonInt8:
    """8 bits without zero points and 4 bits, on a GPU that Triton compiles for or with TRITON_INTERPRET=1."""

    priority: ClassVar[int] = 50
    repacks: ClassVar[bool] = False
    int8_activations: ClassVar[bool] = True

    def why_not(self, spec: LinearSpec) -> str | None:
        scheme, size = spec.scheme, spec.in_features // spec.scheme.groups(spec.in_features)
        if (reason := why_no_triton()) is not None:
            return reason
        if spec.device != "cuda" and not triton.knobs.runtime.interpret:
            return f"needs a GPU, got {spec.device}"
        if spec.device == "cuda" and (reason := too_old()) is not None:
            return reason
        if scheme.bits not in (4, 8) or (scheme.bits == 8 and not scheme.symmetric):
            return f"4 bits, or 8 without zero points, not {scheme}"
        if scheme.activations == "threshold":
            return "one scale a row or for all, no columns chosen on the way"
        if size != spec.in_features and (size < 64 or size & (size - 1)):
            return f"groups of 64 and more, not {size}"
        if spec.in_features > MOST:
            return f"more than {MOST} columns overflow int32"
        if spec.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"rounds in float32, too coarse for {spec.dtype}"
        if spec.dtype is torch.bfloat16 and triton.knobs.runtime.interpret:
            return "the interpreter computes bf16 silently wrong"
        return None

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> TritonInt8Weight:
        return TritonInt8Weight(weight.qweight, weight.scale, weight.zero_point, rounding(weight))

    def restore(self, prepared: TritonInt8Weight, spec: LinearSpec) -> Tensor:
        return prepared.qweight

    def linear(self, x: Tensor, prepared: TritonInt8Weight, spec: LinearSpec) -> Tensor:
        rows, bits, grid = flat(x, spec.in_features), spec.scheme.bits, prepared.rounding
        y = triton_int8(rows, prepared.qweight, prepared.scale, prepared.zero, bits, grid.columns, grid.scale)
        return y.reshape(*x.shape[:-1], spec.out_features)


BACKEND = TritonInt8
