"""What outliers add to a product: a few weights in floating point, as whole input columns or the same number in every row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.kernels._shared.blocks import compute_dtype, flat
from hf_quant.kernels._shared.ops import implements
from hf_quant.kernels._triton.tiles import too_old, why_no_triton

CHUNK = 1 << 22  # activations gathered together: 16 MB in float32

if why_no_triton() is None:
    import triton
    import triton.language as tl

    @triton.jit
    def outlier_kernel(
        x_ptr, index_ptr, value_ptr, y_ptr, M, N, K, R, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
    ):  # fmt: skip
        """y[M, N] = sum over r of x[M, index[N, r]] * value[N, r], in float32."""
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_ok, n_ok = m < M, n < N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r in range(R):
            at = n.to(tl.int64) * R + r
            column = tl.load(index_ptr + at, mask=n_ok, other=0)
            value = tl.load(value_ptr + at, mask=n_ok, other=0.0).to(tl.float32)
            valid = n_ok & (column >= 0) & (column < K)  # no index, wherever it comes from, is read by unseen
            x = tl.load(
                x_ptr + m[:, None].to(tl.int64) * K + column[None, :], mask=m_ok[:, None] & valid[None, :], other=0.0
            )
            acc += x.to(tl.float32) * value[None, :]
        at = m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


def _on_gpu(x: Tensor) -> bool:
    if why_no_triton() is not None or x.dtype is torch.float64:
        return False
    interpreted = triton.knobs.runtime.interpret
    return ((x.device.type == "cuda" and too_old() is None) or interpreted) and not (
        interpreted and x.dtype is torch.bfloat16
    )


@implements("outlier_rows")
def outlier_rows(x: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """``x [M, K]`` times a matrix with ``R`` weights in each row: ``[M, N]``.

    Args:
        x: ``[M, K]``.
        index: int16 or int32 ``[N, R]``, columns.
        value: ``[N, R]``.
    """
    (m, k), (n, r) = x.shape, index.shape
    if _on_gpu(x):
        y = x.new_empty(m, n)
        block_m, block_n = (16, 64) if m > 4 else (1, 256)
        grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
        with torch.cuda.device_of(x):
            outlier_kernel[grid](
                x.contiguous(), index.contiguous(), value.contiguous(), y, m, n, k, r, BLOCK_M=block_m, BLOCK_N=block_n
            )
        return y
    dtype = compute_dtype(x)
    wide, columns, weights = x.to(dtype).T.contiguous(), index.long(), value.to(dtype)
    rows = max(1, CHUNK // max(1, m * r))
    parts = [torch.einsum("nrm,nr->nm", wide[columns[i : i + rows]], weights[i : i + rows]) for i in range(0, n, rows)]
    return torch.cat(parts).T.to(x.dtype).contiguous()


@implements("outlier_rows_backward")
def outlier_rows_backward(grad: Tensor, index: Tensor, value: Tensor, k: int) -> Tensor:
    """``grad [M, N]`` times the same matrix: ``[M, K]``."""
    weight = grad.new_zeros(index.shape[0], k).scatter_(1, index.long(), value.to(grad.dtype))
    return grad @ weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, value = inputs
    ctx.k = x.shape[1]
    ctx.save_for_backward(index, value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return outlier_rows_backward(grad, *ctx.saved_tensors, ctx.k), None, None


outlier_rows.register_autograd(_backward, setup_context=_save)


def outlier_linear(x: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """What outliers add to ``x @ W.T``.

    Args:
        x: ``[..., K]``.
        index: int16 or int32 ``[C]``, the columns of all rows; or ``[N, R]``, each row's own.
        value: ``[N, C]`` or ``[N, R]``.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    if index.ndim == 1:
        return F.linear(x[..., index.long()], value.to(x.dtype))
    y = outlier_rows(flat(x, x.shape[-1]), index, value)
    return y.reshape(*x.shape[:-1], y.shape[-1])
