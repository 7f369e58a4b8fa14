"""Product with codes that index a table of 16 levels (NF4, FP4), looked up in registers: any block size, any shape."""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.kernels import LinearSpec
from hf_quant.kernels._common import looked_up, multiply_back
from hf_quant.numerics import levels
from hf_quant.tensor import QuantizedTensor

FEW, MANY = (16, 64, 32), (64, 64, 32)  # BLOCK_M, BLOCK_N, BLOCK_K
WARPS, STAGES = 4, 3

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def codebook_kernel(
        x_ptr, q_ptr, scale_ptr, table_ptr, y_ptr, M, N, K, G, GROUP,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """y[M, N] = x[M, K] @ (table[q[N, K]] * scale[N, G]).T, q packed along K in bytes, low bits first."""
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_ok, n_ok = m < M, (n < N)[None, :]
        x_row = x_ptr + m[:, None].to(tl.int64) * K
        q_row = q_ptr + n[None, :].to(tl.int64) * (K // 2)
        g_row = n[None, :].to(tl.int64) * G
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):  # BLOCK_K divides K
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_row + k[None, :], mask=m_ok[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
            pair = tl.load(q_row + (k // 2)[:, None], mask=n_ok, other=0).to(tl.int32)
            code = (pair >> ((k % 2) * 4)[:, None]) & 15  # [BLOCK_K, BLOCK_N]
            scale = tl.load(scale_ptr + g_row + (k // GROUP)[:, None], mask=n_ok, other=0.0)
            w = tl.load(table_ptr + code) * scale.to(tl.float32)  # 64 bytes: they stay in the nearest cache
            acc += tl.dot(x, w.to(x.dtype), out_dtype=tl.float32, input_precision="ieee")
        at = m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=m_ok[:, None] & n_ok)


@torch.library.custom_op("hf_quant::triton_codebook", mutates_args=())
def triton_codebook(x: Tensor, qweight: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """``x [M, K]`` times the portable codes ``[N, K / 2]`` of ``table [16]``: ``[M, N]``, accumulated in float32."""
    (m, k), n, groups = x.shape, qweight.shape[0], scale.shape[1]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    block_m, block_n, block_k = FEW if m <= 32 else MANY
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, which need not be the one of x
        codebook_kernel[grid](
            x.contiguous(), qweight.contiguous(), scale.contiguous(), table, y, m, n, k, groups, k // groups,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return y


@triton_codebook.register_fake
def _(x: Tensor, qweight: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], qweight.shape[0])


@torch.library.custom_op("hf_quant::triton_codebook_backward", mutates_args=())
def triton_codebook_backward(grad: Tensor, qweight: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """``grad [M, N]`` times W: ``[M, K]``; looked up block by block in PyTorch."""
    return multiply_back(grad, looked_up(qweight, table), scale, None, 0, qweight.shape[1] * 2)


@triton_codebook_backward.register_fake
def _(grad: Tensor, qweight: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], qweight.shape[1] * 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return triton_codebook_backward(grad, *ctx.saved_tensors), None, None, None


triton_codebook.register_autograd(_backward, setup_context=_save)


class TritonCodebook:
    """Needs a GPU that Triton compiles for, or TRITON_INTERPRET=1."""

    priority: ClassVar[int] = 50
    repacks: ClassVar[bool] = False

    def why_not(self, spec: LinearSpec) -> str | None:
        if not spec.scheme.codebook:
            return "codebooks only, no integers"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if spec.device != "cuda" and not triton.knobs.runtime.interpret:
            return f"needs a GPU, got {spec.device}"
        if spec.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"accumulates in float32, too coarse for {spec.dtype}"
        if spec.dtype is torch.bfloat16 and triton.knobs.runtime.interpret:
            return "the interpreter computes bf16 silently wrong"
        return None

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> tuple[Tensor, ...]:
        assert spec.scheme.codebook is not None
        return weight.qweight, weight.scale, levels(spec.scheme.codebook, weight.qweight.device)

    def restore(self, prepared: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        return prepared[0]

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        y = triton_codebook(x.reshape(-1, spec.in_features), *prepared)
        return y.reshape(*x.shape[:-1], spec.out_features)


BACKEND = TritonCodebook
