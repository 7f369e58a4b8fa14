"""Weight-only product on packed codes, unpacked in registers: 2, 3, 4 or 8 bits, any group size, any shape."""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.kernels import LinearSpec
from hf_quant.kernels._common import multiply_back
from hf_quant.packing import unpack
from hf_quant.tensor import QuantizedTensor

FEW, MANY = (16, 64, 32), (64, 64, 32)  # BLOCK_M, BLOCK_N, BLOCK_K
WARPS, STAGES = 4, 3

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def wna16_kernel(
        x_ptr, q_ptr, scale_ptr, zero_ptr, y_ptr, M, N, K, WORDS, G, GROUP,
        BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """y[M, N] = x[M, K] @ ((q[N, K] - zero[N, G]) * scale[N, G]).T, q packed along K in int32 words."""
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_ok, n_ok = m < M, n < N
        x_row = x_ptr + m[:, None].to(tl.int64) * K
        q_row = q_ptr + n[None, :].to(tl.int64) * WORDS
        g_row = n[None, :].to(tl.int64) * G
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):  # BLOCK_K divides K
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_row + k[None, :], mask=m_ok[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
            bit = k * BITS
            word, shift = bit // 32, bit % 32
            ok = n_ok[None, :]
            low = tl.load(q_row + word[:, None], mask=ok, other=0).to(tl.uint32, bitcast=True)
            code = low >> shift[:, None].to(tl.uint32)
            if BITS == 3:  # a code that crosses a word ends in the next one
                crosses = shift > 29
                high = tl.load(q_row + word[:, None] + 1, mask=ok & crosses[:, None], other=0)
                up = tl.where(crosses, 32 - shift, 0).to(tl.uint32)
                code |= tl.where(crosses[:, None], high.to(tl.uint32, bitcast=True) << up[:, None], 0)
            code = (code & ((1 << BITS) - 1)).to(tl.int32)  # [BLOCK_K, BLOCK_N]
            at = g_row + (k // GROUP)[:, None]
            scale = tl.load(scale_ptr + at, mask=ok, other=0.0)
            w = code.to(tl.float32)
            if HAS_ZERO:  # integers, or HQQ's real numbers
                w -= tl.load(zero_ptr + at, mask=ok, other=0).to(tl.float32)
            else:
                w -= 1 << (BITS - 1)
            w *= scale.to(tl.float32)
            acc += tl.dot(x, w.to(x.dtype), out_dtype=tl.float32, input_precision="ieee")
        at = m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


@torch.library.custom_op("hf_quant::triton_wna16", mutates_args=())
def triton_wna16(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``x [M, K]`` times the portable codes ``[N, K / 8 * bits]``: ``[M, N]``, accumulated in float32."""
    x, words = x.contiguous(), qweight.contiguous().view(torch.int32)
    (m, k), n, groups = x.shape, words.shape[0], scale.shape[1]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    block_m, block_n, block_k = FEW if m <= 32 else MANY
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, which need not be the one of x
        wna16_kernel[grid](
            x, words, scale.contiguous(), zero if zero is None else zero.contiguous(), y,
            m, n, k, words.shape[1], groups, k // groups,
            BITS=bits, HAS_ZERO=zero is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return y


@triton_wna16.register_fake
def _(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], qweight.shape[0])


@torch.library.custom_op("hf_quant::triton_wna16_backward", mutates_args=())
def triton_wna16_backward(grad: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``grad [M, N]`` times W: ``[M, K]``; dequantized block by block in PyTorch."""
    k = qweight.shape[1] * 8 // bits
    return multiply_back(grad, lambda i, j: unpack(qweight[i:j], bits), scale, zero, 1 << (bits - 1), k)


@triton_wna16_backward.register_fake
def _(grad: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    return grad.new_empty(grad.shape[0], qweight.shape[1] * 8 // bits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, scale, zero, ctx.bits = inputs
    ctx.save_for_backward(qweight, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return triton_wna16_backward(grad, *ctx.saved_tensors, ctx.bits), None, None, None, None


triton_wna16.register_autograd(_backward, setup_context=_save)


class TritonWNA16:
    """Needs a GPU that Triton compiles for, or TRITON_INTERPRET=1."""

    priority: ClassVar[int] = 50
    repacks: ClassVar[bool] = False

    def why_not(self, spec: LinearSpec) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if spec.scheme.codebook:
            return "integers only, no codebooks"
        if spec.device != "cuda" and not triton.knobs.runtime.interpret:
            return f"needs a GPU, got {spec.device}"
        if spec.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"accumulates in float32, too coarse for {spec.dtype}"
        if spec.dtype is torch.bfloat16 and triton.knobs.runtime.interpret:
            return "the interpreter computes bf16 silently wrong"
        return None

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> tuple[Tensor, ...]:
        parts = (weight.qweight, weight.scale, weight.zero_point)
        return tuple(part for part in parts if part is not None)

    def restore(self, prepared: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        return prepared[0]

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        zero = prepared[2] if len(prepared) == 3 else None
        y = triton_wna16(x.reshape(-1, spec.in_features), prepared[0], prepared[1], zero, spec.scheme.bits)
        return y.reshape(*x.shape[:-1], spec.out_features)


BACKEND = TritonWNA16
