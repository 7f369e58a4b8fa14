"""What kernels share: multiplying by a weight that is dequantized a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.core.private_torch import cpu_has, refuse_forward_mode
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import KernelError
from hf_quant.kernels._shared.registration import outside

BLOCK = 1 << 20  # weights dequantized together: 4 MB in float32, which stays in a cache

Codes = Callable[[int, int], Tensor]  # rows from, to (exclusive) -> [rows, K]: uint8 codes, or levels of a codebook


@lru_cache
def cpu_multiplies_bf16() -> bool:
    """Whether bf16 products are instructions here; without them float32 is two to four times faster."""
    return cpu_has("avx512_bf16", "amx_tile")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply ``x`` in."""
    if x.device.type != "cpu" or x.dtype not in (torch.float16, torch.bfloat16):
        return x.dtype
    return torch.bfloat16 if x.dtype is torch.bfloat16 and cpu_multiplies_bf16() else torch.float32


def looked_up(qweight: Tensor, table: Tensor) -> Codes:
    """Gives some rows of levels ``[rows, K]`` of four-bit codes ``[N, K / 2]``, two at a time."""
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], -1)  # [256, 2]: of the low and the high bits
    return lambda i, j: pairs.index_select(0, qweight[i:j].flatten().int()).view(j - i, -1)


def as_asked(device: str) -> AbstractContextManager[object]:
    """Keeps autocast, which reaches into custom ops, from rounding what `compute_dtype` chose to bf16."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def _blocks(
    codes: Codes, scale: Tensor, zero: Tensor | None, fixed: int, k: int, dtype: torch.dtype, step: int
) -> Iterator[tuple[int, int, Tensor]]:
    """``(i, j, W[i:j])`` over the rows of W, dequantized to ``dtype``; ``step`` divides the rows of every block."""
    n, groups = scale.shape
    wide = torch.promote_types(dtype, scale.dtype)  # scales may be finer than what is multiplied in
    rows = max(step, BLOCK // k // step * step)
    for i in range(0, n, rows):
        j = min(i + rows, n)
        w = codes(i, j).to(wide).unflatten(-1, (groups, -1))
        w -= fixed if zero is None else zero[i:j, :, None].to(wide)
        w *= scale[i:j, :, None].to(wide)
        yield i, j, w.flatten(-2).to(dtype)


def multiply(x: Tensor, codes: Codes, scale: Tensor, zero: Tensor | None, fixed: int, step: int = 1) -> Tensor:
    """``x [M, K] @ W.T``, in the dtype of ``x``; W never exists whole.

    Args:
        x: ``[M, K]``.
        codes: Gives some rows of the codes.
        scale: ``[N, G]``.
        zero: ``[N, G]``, or None where all zero points are ``fixed``.
        fixed: The zero point of a symmetric scheme.
        step: Rows come in multiples of this.
    """
    dtype = compute_dtype(x)
    wide, y = x.to(dtype), x.new_empty(x.shape[0], scale.shape[0])
    with as_asked(x.device.type):
        for i, j, w in _blocks(codes, scale, zero, fixed, x.shape[1], dtype, step):
            y[:, i:j] = F.linear(wide, w)
    return y


def multiply_back(
    grad: Tensor, codes: Codes, scale: Tensor, zero: Tensor | None, fixed: int, k: int, step: int = 1
) -> Tensor:
    """``grad [M, N] @ W``: what `multiply` passes on to ``x``; the blocks are added up in float32 at least."""
    dtype = compute_dtype(grad)
    total = torch.promote_types(dtype, torch.float32)  # hundreds of blocks in a language-model head
    wide, out = grad.to(dtype), grad.new_zeros(grad.shape[0], k, dtype=total)
    with as_asked(grad.device.type):
        for i, j, w in _blocks(codes, scale, zero, fixed, k, dtype, step):
            out += wide[:, i:j] @ w
    return out.to(grad.dtype)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the activations of a layer are rounded to INT8.

    Attributes:
        columns: int16 or int32 ``[C]``, the outlier columns, which are left out; None for none.
        scale: Floating point ``[1]``, of all activations; None for one of each row.
    """

    columns: Tensor | None
    scale: Tensor | None


def rounding(weight: QuantizedTensor) -> Rounding:
    """How the scheme of ``weight`` rounds its activations.

    Raises:
        KernelError: An outlier column is outside of the weight.
    """
    index = weight.outliers.index if weight.outliers is not None and weight.scheme.outlier_columns else None
    if index is not None and (wrong := outside(index, weight.in_features)) is not None:
        raise KernelError(f"the index of outlier columns {wrong}")
    return Rounding(index, weight.input_scale)


def flat(x: Tensor, columns: int) -> Tensor:
    """``x [..., K]`` as ``[M, K]``, for a weight of K ``columns``."""
    if x.shape[-1:] != (columns,):
        raise KernelError(f"x has {x.shape[-1] if x.ndim else 'no'} columns, the weight has {columns}")
    refuse_forward_mode(x)
    return x.reshape(-1, columns)
