"""Weight-only product on GPUs, unpacked in registers: 2, 3, 4 or 8 bits and codebooks, any group size, any shape.

The codes are laid out anew at load (`_triton.planar`), those of 5, 6 and 7 bits in 8. Few rows of x are multiplied by one kernel that also adds bias and outliers
(`_triton.wna16`), in tiles from a table (`_triton.tiles`); many rows by the dequantized weight, since reading it once more costs little then.
The same rows give the same bits every time, and nothing waits for the GPU: both hold inside CUDA graphs. Stacked experts are
multiplied by the same kernel, all at once, each by the rows that the router sorted to it on the GPU (`_shared.routing`).
A layer must not run twice at the same time on two streams: the programs of a product count their parts in its ``counters``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.core.layout import scale_parts
from hf_quant.core.numerics import levels
from hf_quant.core.packing import pack, unpack
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._shared.blocks import flat
from hf_quant.kernels._shared.ops import implements
from hf_quant.kernels._shared.routing import back_in_order, cut, spans
from hf_quant.kernels._triton.constants import NARROW, constants
from hf_quant.kernels._triton.fallback import launched
from hf_quant.kernels._triton.planar import (
    from_planes,
    grouped,
    held_in,
    parsed,
    plane,
    to_planes,
)
from hf_quant.kernels._triton.tiles import Tile, tile_for, too_old, why_no_triton

if why_no_triton() is None:
    import triton

    from hf_quant.kernels._triton.wna16 import dequantize_kernel, wna16_kernel

COUNTERS = 4096  # tiles whose columns may be shared
CHUNK = 1 << 26  # weights dequantized together: 128 MB
FLOAT32 = Tile(16, 64, 4, 2, 1)  # without tensor cores


def _scattered(index: Tensor | None, packed: Tensor) -> bool:
    """Whether every row of the weight has outliers of its own, not the same columns."""
    return index is not None and index.ndim == packed.ndim


@implements("triton_wna16")
def triton_wna16(
    x: Tensor, packed: Tensor, counters: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    bias: Tensor | None, index: Tensor | None, value: Tensor | None, scheme: str,
) -> Tensor:  # fmt: skip
    """``x [M, K]`` times the codes in planes: ``[M, N]``, accumulated in float32.

    Args:
        x: ``[M, K]``.
        packed: int16 ``[N, words]``.
        counters: int32 zeros, and zeros again afterwards.
        scale: ``[G, N]``.
        zero: ``[G, N]``, or None where the scheme is symmetric.
        table: float32 ``[16]``, the levels of a codebook, or None.
        bias: ``[N]``, or None.
        index: int16 or int32 ``[C]`` or ``[N, R]``, the columns of outliers, or None.
        value: ``[N, C]`` or ``[N, R]``, or None.
        scheme: As a slug.
    """
    (m, k), n = x.shape, packed.shape[0]
    how = parsed(scheme)
    if m == 0:
        return x.new_empty(m, n)
    blocks = packed.shape[1] // plane(grouped(how, k), held_in(how.bits))
    tile = FLOAT32 if x.dtype is torch.float32 else None
    if x.dtype in NARROW:
        tile = tile_for(x.device, held_in(how.bits), m, n, k, blocks, scattered=_scattered(index, packed))
    dense = partial(densely, x, packed, scale, zero, table, bias, index, value, how)
    if tile is None:
        return dense()
    return launched(
        ("triton_wna16", scheme, x.dtype, tile, x.device),
        partial(launch, x, packed, counters, scale, zero, table, bias, index, value, how, tile),
        dense,
    )


def launch(
    x: Tensor, packed: Tensor, counters: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    bias: Tensor | None, index: Tensor | None, value: Tensor | None, scheme: QuantScheme, tile: Tile,
    ends: Tensor | None = None, order: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The product of `triton_wna16`, or with ``ends`` that of `triton_experts`, in tiles of one's own choice."""
    k, (n, width), split = x.shape[1], packed.shape[-2:], tile.split_k
    m = x.shape[0] if order is None else order.numel()
    cuts = None if ends is None else cut(ends, m, tile.block_m)
    y = x.new_empty(m, n) if ends is None else x.new_zeros(m, n)  # nothing is written for experts that are not here
    grid = (-(-n // tile.block_n), -(-m // tile.block_m) if cuts is None else cuts.shape[0], split)
    if grid[0] * grid[1] > counters.numel():
        grid, split = (*grid[:2], 1), 1
    part = y.new_empty(split, m, n, dtype=torch.float32) if split > 1 else None
    columns = index is not None and not _scattered(index, packed)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, which need not be the one of x
        wna16_kernel[grid](
            x.contiguous(), packed, scale, zero, table, _whole(bias), _whole(index), _whole(value), y, part,
            counters if split > 1 else None, cuts, None if order is None else order.int(),
            m, n, k, width, scale.shape[-2], 0 if index is None else index.shape[-1],
            **constants(scheme, k, x.dtype, _ptx(x), tile.after), AFTER=tile.after, COLUMNS=columns,
            TOP_K=_choices(x, order), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SPLIT_K=split, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def densely(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bias: Tensor | None,
    index: Tensor | None, value: Tensor | None, scheme: QuantScheme,
) -> Tensor:  # fmt: skip
    """The product of `triton_wna16` by the dequantized weight."""
    y = x.new_empty(x.shape[0], packed.shape[0])
    for i, j, w in _dense(packed, scale, zero, table, index, value, scheme, x.shape[1], x.dtype):
        y[:, i:j] = F.linear(x, w, None if bias is None else bias[i:j].to(x.dtype))
    return y


def _choices(x: Tensor, order: Tensor | None) -> int:
    """top_k: how often each row of x is chosen."""
    return 1 if order is None else order.shape[0] // max(1, x.shape[0])


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _ptx(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.version.hip is None and not triton.knobs.runtime.interpret


def _dense(
    packed: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, index: Tensor | None,
    value: Tensor | None, scheme: QuantScheme, k: int, dtype: torch.dtype,
) -> Iterator[tuple[int, int, Tensor]]:  # fmt: skip
    """``(i, j, W[i:j])``, outliers and all, over the rows of W."""
    n, width = packed.shape
    group = grouped(scheme, k)
    bits = held_in(scheme.bits)
    size, rows = plane(group, bits), max(1, CHUNK // k)
    for i in range(0, n, rows):
        j = min(i + rows, n)
        w = scale.new_empty(j - i, k, dtype=dtype)
        with torch.cuda.device_of(packed):
            dequantize_kernel[(-(-(j - i) // 16), width // size)](
                packed, scale, zero, table, w, i, j - i, n, k, width, scale.shape[0],
                BITS=bits, GROUP=group, P=size, FIXED=scheme.zero, BLOCK_N=16,
            )  # fmt: skip
        if index is not None and value is not None:
            w = Outliers(index if index.ndim == 1 else index[i:j], value[i:j]).add_to(w)
        yield i, j, w


@implements("triton_wna16_backward")
def triton_wna16_backward(
    grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, index: Tensor | None,
    value: Tensor | None, scheme: str, k: int,
) -> Tensor:  # fmt: skip
    """``grad [M, N]`` times W: ``[M, K]``."""
    out: Tensor | None = None
    for i, j, w in _dense(packed, scale, zero, table, index, value, parsed(scheme), k, grad.dtype):
        part = grad[:, i:j] @ w
        if j - i == packed.shape[0]:
            return part
        out = part.float() if out is None else out + part
    assert out is not None
    return out.to(grad.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, _, scale, zero, table, _, index, value, ctx.scheme = inputs
    ctx.k = x.shape[1]
    ctx.save_for_backward(packed, scale, zero, table, index, value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = triton_wna16_backward(grad, *ctx.saved_tensors, ctx.scheme, ctx.k) if ctx.needs_input_grad[0] else None
    bias = grad.sum(0) if ctx.needs_input_grad[6] else None
    return back, None, None, None, None, None, bias, None, None, None


triton_wna16.register_autograd(_backward, setup_context=_save)


@implements("triton_experts")
def triton_experts(
    x: Tensor, packed: Tensor, counters: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    bias: Tensor | None, index: Tensor | None, value: Tensor | None, scheme: str, ends: Tensor, order: Tensor | None,
) -> Tensor:  # fmt: skip
    """`triton_wna16` with a weight for every expert: ``[rows, N]``, those of one expert after those of another.

    Waits for the GPU only where so many rows fall to each expert that its weight is dequantized.

    Args:
        x: ``[M, K]``.
        packed: int16 ``[E, N, words]``; scale, zero, bias, index and value have the same first axis.
        counters: int32 zeros, and zeros again afterwards.
        scale: ``[E, G, N]``.
        zero: ``[E, G, N]``, or None.
        table: float32 ``[16]``, or None.
        bias: ``[E, N]``, or None.
        index: int16 or int32 ``[E, C]`` or ``[E, N, R]``, or None.
        value: ``[E, N, C]`` or ``[E, N, R]``, or None.
        scheme: Of all experts, as a slug.
        ends: int64 ``[E]``, where the rows of each expert end (`by_expert`); those after the last are zero.
        order: int64 ``[M * top_k]``, which choice every row is of; None where the rows of x are in this order already.
    """
    (m, k), (e, n, width), how = x.shape, packed.shape, parsed(scheme)
    rows = m if order is None else order.shape[0]
    if rows == 0:
        return x.new_empty(0, n)
    tile = FLOAT32 if x.dtype is torch.float32 else None
    if x.dtype in NARROW:
        blocks = width // plane(grouped(how, k), held_in(how.bits))
        tile = tile_for(x.device, held_in(how.bits), rows, n, k, blocks, e, scattered=_scattered(index, packed))
    dense = partial(_one_by_one, x, packed, scale, zero, table, bias, index, value, how, ends, order)
    if tile is None:
        return dense()
    return launched(
        ("triton_experts", scheme, x.dtype, tile, x.device),
        partial(launch, x, packed, counters, scale, zero, table, bias, index, value, how, tile, ends, order),
        dense,
    )


def _one_by_one(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bias: Tensor | None,
    index: Tensor | None, value: Tensor | None, scheme: QuantScheme, ends: Tensor, order: Tensor | None,
) -> Tensor:  # fmt: skip
    """The product of `triton_experts` by the dequantized weight of one expert after the other."""
    rows = x if order is None else x[order // _choices(x, order)]
    y = x.new_zeros(rows.shape[0], packed.shape[1])
    for i, j, (w, s, z, b, c, v) in spans(ends, packed, scale, zero, bias, index, value):
        y[i:j] = densely(rows[i:j], w, s, z, table, b, c, v, scheme)
    return y


@implements("triton_experts_backward")
def triton_experts_backward(
    grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, index: Tensor | None,
    value: Tensor | None, ends: Tensor, scheme: str, k: int,
) -> Tensor:  # fmt: skip
    """``grad [rows, N]`` times the weight of each row's expert: ``[rows, K]``."""
    out = grad.new_zeros(grad.shape[0], k)
    for i, j, (w, s, z, c, v) in spans(ends, packed, scale, zero, index, value):
        out[i:j] = triton_wna16_backward(grad[i:j], w, s, z, table, c, v, scheme, k)
    return out


def _save_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, _, scale, zero, table, _, index, value, ctx.scheme, ends, order = inputs
    ctx.m, ctx.k = x.shape
    ctx.top_k = _choices(x, order)
    ctx.save_for_backward(packed, scale, zero, table, index, value, ends, order)


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *weight, ends, order = ctx.saved_tensors
    back = bias = None
    if ctx.needs_input_grad[0]:
        back = triton_experts_backward(grad, *weight, ends, ctx.scheme, ctx.k)
        if order is not None:  # summed over the choices of a row in their order, the same every time
            back = back_in_order(back, order).view(ctx.m, ctx.top_k, ctx.k).sum(1)
    if ctx.needs_input_grad[6]:
        expert = torch.searchsorted(ends, torch.arange(grad.shape[0], device=grad.device), right=True)
        bias = (expert == torch.arange(ends.shape[0], device=grad.device)[:, None]).to(grad.dtype) @ grad
    return back, None, None, None, None, None, bias, None, None, None, None, None


triton_experts.register_autograd(_experts_backward, setup_context=_save_experts)


@dataclass(frozen=True, slots=True)
class PlanarWeight:
    """A weight ``[N, K]`` in planes, or a stack of them, whose tensors but ``counters`` and ``table`` begin with an axis E.

    Attributes:
        packed: int16 ``[N, words]``.
        counters: int32 zeros; a product that shares columns counts in them, and leaves zeros.
        scale: ``[G, N]``.
        zero: ``[G, N]``, or None where the scheme is symmetric or has a codebook.
        table: float32 ``[16]``, the levels of a codebook, or None.
    """

    packed: Tensor
    counters: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None


class TritonWNA16:
    """Needs a GPU that Triton compiles for, or TRITON_INTERPRET=1."""

    priority: ClassVar[int] = 50
    repacks: ClassVar[bool] = True

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := why_no_triton()) is not None:
            return reason
        if spec.device != "cuda" and not triton.knobs.runtime.interpret:
            return f"needs a GPU, got {spec.device}"
        if spec.device == "cuda" and (reason := too_old()) is not None:
            return reason
        if spec.dtype not in (torch.float32, *NARROW):
            return f"accumulates in float32, too coarse for {spec.dtype}"
        if spec.scheme.codebook and torch.version.hip:
            return "levels are looked up by instructions of NVIDIA's"
        if spec.dtype is torch.bfloat16 and triton.knobs.runtime.interpret:
            return "the interpreter computes bf16 silently wrong"
        return None

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> PlanarWeight:
        scheme = spec.scheme
        bits = held_in(scheme.bits)
        packed = to_planes(_widened(weight.qweight, scheme.bits), bits, plane(grouped(scheme, spec.in_features), bits))
        counters = torch.zeros(COUNTERS, dtype=torch.int32, device=packed.device)
        zero = None if weight.zero_point is None else weight.zero_point.mT.contiguous()
        table = levels(scheme.codebook, packed.device) if scheme.codebook else None
        return PlanarWeight(packed, counters, weight.scale.mT.contiguous(), zero, table)

    def restore(self, prepared: PlanarWeight, spec: LinearSpec) -> Tensor:
        bits = held_in(spec.scheme.bits)
        codes = from_planes(
            prepared.packed, bits, plane(grouped(spec.scheme, spec.in_features), bits), spec.in_features
        )
        return codes if bits == spec.scheme.bits else pack(codes, spec.scheme.bits)

    def scales(self, prepared: PlanarWeight, spec: LinearSpec) -> dict[str, Tensor]:
        """See `LinearBackend`; those in two levels were multiplied out."""
        if spec.scheme.scale_bits is not None:
            return {}
        return scale_parts(prepared.scale.mT, None if prepared.zero is None else prepared.zero.mT, spec.scheme)

    def linear(self, x: Tensor, prepared: PlanarWeight, spec: LinearSpec) -> Tensor:
        return self.fused(x, prepared, spec)

    def fused(
        self, x: Tensor, prepared: PlanarWeight, spec: LinearSpec, bias: Tensor | None = None,
        outliers: Outliers | None = None,
    ) -> Tensor:  # fmt: skip
        """`linear` with bias and outliers added before the result is rounded."""
        y = triton_wna16(flat(x, spec.in_features), *_operands(prepared, bias, outliers), str(spec.scheme))
        return y.reshape(*x.shape[:-1], spec.out_features)

    def experts(
        self, x: Tensor, prepared: PlanarWeight, spec: LinearSpec, ends: Tensor, order: Tensor | None = None,
        bias: Tensor | None = None, outliers: Outliers | None = None,
    ) -> Tensor:  # fmt: skip
        """`fused` for a stack of weights; see `triton_experts`."""
        return triton_experts(
            flat(x, spec.in_features), *_operands(prepared, bias, outliers), str(spec.scheme), ends, order
        )


def _widened(qweight: Tensor, bits: int) -> Tensor:
    """Portable codes in the width that a word has room for."""
    return qweight if bits == held_in(bits) else unpack(qweight, bits)


def _operands(prepared: PlanarWeight, bias: Tensor | None, outliers: Outliers | None) -> tuple[Any, ...]:
    """What the ops are given between x and the scheme."""
    weight = (prepared.packed, prepared.counters, prepared.scale, prepared.zero, prepared.table)
    index, value = (None, None) if outliers is None else (outliers.index, outliers.value)
    return *weight, bias, index, value


BACKEND = TritonWNA16
