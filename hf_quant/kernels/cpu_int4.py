"""PyTorch's packed int4 product on CPUs; 3-bit codes are widened for it, 8-bit ones become two planes of four bits.

``aten._weight_int4pack_mm_for_cpu`` computes ``w = (q - 8) * scale + zero`` with bf16 activations and scales, and is two
to five times faster than a dense bf16 product for a few rows. Its packing depends on the instruction set (64 rows
interleaved with AVX-512, 32 otherwise), so the packed bytes never leave this process: `restore` gives the portable ones.
For many rows the codes are dequantized block by block, with the scales as they were.

Few rows: 4-bit layers of float16 and float32 models round activations and scales to bf16, which is small beside the error
of four bits; 8-bit layers come here only in bf16 models. Three bits take the room of four in memory (not on disk): without
that they would be thirty times slower. HF_QUANT_BACKEND=dequant keeps them narrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.packing import pack, unpack
from hf_quant.core.private_torch import multiply_int4, pack_int4
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._shared.blocks import Codes, cpu_multiplies_bf16, flat, multiply, multiply_back
from hf_quant.kernels._shared.ops import implements

GROUPS = (256, 128, 64, 32)  # the group sizes that the op takes
CHUNK = 256  # rows packed together: the op wants them as int32


def _pack(codes: Tensor) -> Tensor:
    """uint8 codes ``[N, K]`` of four bits to the op's own layout, uint8 ``[N, K / 2]``; N is a multiple of 16."""
    return pack_int4(codes.int(), 1)


def _planes(qweight: Tensor, bits: int) -> Tensor:
    """Portable codes ``[N, ...]`` to ``planes [P, N, K / 2]``, some rows at a time."""
    n, k = qweight.shape[0], qweight.shape[1] * 8 // bits
    planes = qweight.new_empty(2 if bits == 8 else 1, n, k // 2)
    for i in range(0, n, CHUNK):
        codes = unpack(qweight[i : i + CHUNK], bits)
        for plane, part in zip(planes, (codes >> 4, codes & 15) if bits == 8 else (codes,), strict=True):
            plane[i : i + CHUNK] = _pack(part)
    return planes


def _few_rows(planes: int) -> int:
    """Below this many rows the packed product is faster than dequantizing (``benchmarks/cpu_linear.py``)."""
    return 192 if planes == 1 and not cpu_multiplies_bf16() else 64


@lru_cache
def _interleaved() -> int:
    """How many rows the op interleaves here, found by packing rows whose codes tell the halves of a block apart."""
    codes = (torch.arange(64)[:, None] // 32).expand(64, 32).to(torch.uint8)
    first = _pack(codes)[:32]
    return 32 if int(first.max()) == 0 else 64


@lru_cache
@torch.inference_mode(False)
def _rows_at(size: int) -> Tensor:
    """Row of each code of `_lanes` in a block of ``size`` rows, as an index that sorts them."""
    rows = torch.arange(size, dtype=torch.uint8)[:, None].expand(size, 32)
    planes = torch.stack([_pack(part.contiguous()) for part in (rows >> 4, rows & 15)])
    return torch.argsort(_lanes(planes.view(2, 32, size // 2))[0].int())


def _lanes(planes: Tensor) -> Tensor:
    """Codes ``[..., 2 L]`` out of ``planes [P, ..., L]``: those in the low nibbles, then those in the high ones."""
    if planes.shape[0] == 1:
        return torch.cat([planes[0] & 15, planes[0] >> 4], -1)
    high, low = planes
    return torch.cat([high << 4 | low & 15, high & 240 | low >> 4], -1)


def _unpack(planes: Tensor) -> Tensor:
    """Codes ``[N, K]`` of ``planes [P, N, K / 2]``, for whole blocks of rows or for the last rows of a matrix."""
    n, k = planes.shape[1], planes.shape[2] * 2
    size = _interleaved()
    whole = n // size * size
    parts = [_unpack_blocks(planes[:, :whole], size, k)] if whole else []
    if n > whole:
        parts.append(_unpack_blocks(planes[:, whole:], n - whole, k))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unpack_blocks(planes: Tensor, size: int, k: int) -> Tensor:
    codes = _lanes(planes.reshape(planes.shape[0], -1, k, size // 2))  # [blocks, K, size]
    order = _rows_at(size)
    if not torch.equal(order, torch.arange(size)):
        codes = codes[..., order]
    return codes.transpose(1, 2).reshape(-1, k)


def _codes(planes: Tensor) -> Codes:
    """Rows of the codes out of ``planes [P, N, K / 2]``."""
    return lambda i, j: _unpack(planes[:, i:j])


@implements("cpu_int4_linear")
def cpu_int4_linear(
    x: Tensor, planes: Tensor, scale_and_zero: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, fixed: int
) -> Tensor:
    """``x [M, K]`` times the packed codes: ``[M, N]``.

    Args:
        x: ``[M, K]``.
        planes: uint8 ``[P, N, K / 2]`` in the op's layout; P is 2 for eight bits (high, low), else 1.
        scale_and_zero: bf16 ``[P, K / group_size, N, 2]``.
        scale: ``[N, G]``, as stored.
        zero: uint8 ``[N, G]``, or None.
        group_size: That of ``scale_and_zero``.
        fixed: The zero point where ``zero`` is None.
    """
    if x.shape[0] >= _few_rows(planes.shape[0]):
        return multiply(x, _codes(planes), scale, zero, fixed, step=64)
    few = x.to(torch.bfloat16).contiguous()
    products = [
        multiply_int4(few, plane, group_size, params)
        for plane, params in zip(planes.unbind(), scale_and_zero.unbind(), strict=True)
    ]
    y = products[0] if len(products) == 1 else products[0].float() + products[1].float()
    return y.to(x.dtype)


@implements("cpu_int4_linear_backward")
def cpu_int4_linear_backward(grad: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, fixed: int) -> Tensor:
    """``grad [M, N]`` times W: ``[M, K]``."""
    return multiply_back(grad, _codes(planes), scale, zero, fixed, planes.shape[2] * 2, step=64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, planes, _, scale, zero, _, ctx.fixed = inputs
    ctx.save_for_backward(planes, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return cpu_int4_linear_backward(grad, *ctx.saved_tensors, ctx.fixed), None, None, None, None, None, None


cpu_int4_linear.register_autograd(_backward, setup_context=_save)


def _group_size(spec: LinearSpec) -> int | None:
    """The largest group size the op takes that divides the layer's."""
    size_of_layer = spec.in_features // spec.scheme.groups(spec.in_features)
    return next((size for size in GROUPS if size_of_layer % size == 0), None)


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight ``[N, K]`` in the layout of PyTorch's op.

    Attributes:
        planes: uint8 ``[P, N, K / 2]``; P is 2 for eight bits (high, low), else 1.
        scale_and_zero: bf16 ``[P, K / group_size, N, 2]``.
        scale: ``[N, G]``, as stored.
        zero: uint8 ``[N, G]``, or None where the scheme is symmetric.
    """

    planes: Tensor
    scale_and_zero: Tensor
    scale: Tensor
    zero: Tensor | None


class CpuInt4:
    """3 and 4 bits, and 8 bits symmetric in bf16 models."""

    priority: ClassVar[int] = 30
    repacks: ClassVar[bool] = True

    def why_not(self, spec: LinearSpec) -> str | None:
        scheme = spec.scheme
        if spec.device != "cpu":
            return f"needs a CPU, got {spec.device}"
        if pack_int4 is None or multiply_int4 is None:
            return "this version of torch has no packed INT4 product"
        if spec.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the op rounds to bf16, too coarse for {spec.dtype}"
        if scheme.codebook:
            return "integers only, no codebooks"
        if scheme.bits not in (3, 4, 8):
            return f"no packed product for {scheme.bits} bits"
        if scheme.bits == 8 and not (scheme.symmetric and spec.dtype is torch.bfloat16):
            return "8 bits only symmetric and in bf16: the op's scales and zero points are bf16"
        if spec.out_features % 16:
            return f"out_features {spec.out_features} is not a multiple of 16"
        if _group_size(spec) is None:
            return f"group size {scheme.group_size} is not a multiple of 32"
        return None

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> Int4Weight:
        size = _group_size(spec)
        assert size is not None
        repeat = spec.in_features // weight.scale.shape[1] // size
        scale = weight.scale.repeat_interleave(repeat, 1).T.float()  # [K / size, N]
        if spec.scheme.bits < 8:
            zero = weight.zeros().repeat_interleave(repeat, 1).T.float()
            params = [torch.stack([scale, (8 - zero) * scale], -1)]
        else:  # (16 high + low - 128) scale = (high - 8) 16 scale + ((low - 8) scale + 8 scale)
            params = [torch.stack([16 * scale, 0 * scale], -1), torch.stack([scale, 8 * scale], -1)]
        scale_and_zero = torch.stack(params).to(torch.bfloat16).contiguous()
        return Int4Weight(_planes(weight.qweight, spec.scheme.bits), scale_and_zero, weight.scale, weight.zero_point)

    def restore(self, prepared: Int4Weight, spec: LinearSpec) -> Tensor:
        codes = _codes(prepared.planes)
        rows = [codes(i, min(i + CHUNK, spec.out_features)) for i in range(0, spec.out_features, CHUNK)]
        return torch.cat([pack(part, spec.scheme.bits) for part in rows])

    def linear(self, x: Tensor, prepared: Int4Weight, spec: LinearSpec) -> Tensor:
        params = prepared.scale_and_zero
        size, fixed = spec.in_features // params.shape[1], spec.scheme.zero
        rows = flat(x, spec.in_features)
        y = cpu_int4_linear(rows, prepared.planes, params, prepared.scale, prepared.zero, size, fixed)
        return y.reshape(*x.shape[:-1], spec.out_features)


BACKEND = CpuInt4
