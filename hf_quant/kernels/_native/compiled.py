"""The module compiled from ``hf_quant/kernels/_native/csrc``, and weights in its layout: what the backends that call it share.

HF_QUANT_CPU_LEVEL caps the instruction set: portable, avx2, avx512, vnni or amx. HF_QUANT_LARGE_PAGES=0 keeps weights in
ordinary memory, over which a sanitizer can watch.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor

from hf_quant.core.private_torch import empty_on_cpu
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import BackendError, KernelError
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._shared import checks
from hf_quant.kernels._shared.blocks import BLOCK, as_asked, compute_dtype
from hf_quant.kernels._shared.ops import implements
from hf_quant.kernels._shared.registration import Arguments

try:
    from hf_quant.kernels import _cpu as _cpu
except ImportError:  # it was not built; `why_not` says so
    _cpu = None  # type: ignore[assignment]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGE, MAPPED = 2 << 20, 64 << 20  # bytes of a large page, and of what is mapped at a time
LARGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE") and os.environ.get("HF_QUANT_LARGE_PAGES") != "0"
LEVELS = ("portable", "avx2", "avx512", "vnni", "amx")

if _cpu is not None and (wanted := os.environ.get("HF_QUANT_CPU_LEVEL")):
    if wanted not in LEVELS:
        raise BackendError(f"HF_QUANT_CPU_LEVEL must be one of {', '.join(LEVELS)}, got {wanted!r}")
    _cpu.limit(wanted)


def built() -> str | None:
    """The instruction set in use; None where nothing was compiled."""
    return None if _cpu is None else _cpu.level()


def why_not(spec: LinearSpec) -> str | None:
    """Why a weight cannot lie in this layout, or None if it can."""
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


class LaidOut(tuple[Tensor, ...]):
    """Tiles, scales, and zero points where they are not all ``2 ** (bits - 1)``; see ``csrc/cpu.h``. Others may follow.

    ``weight`` is what `described` says of them, asked once: every tensor that is looked at costs one row a percent.
    """

    weight: bytes


def laid_out(weight: QuantizedTensor, spec: LinearSpec, *more: Tensor) -> LaidOut:
    """In memory that nothing moves; ``more`` goes along."""
    n, k, bits = spec.out_features, spec.in_features, spec.scheme.bits
    codes = weight.qweight.contiguous()
    tiles = _room.take((n + 15) // 16 * 2 * k * bits).view(-1, k // 32, 64 * bits)
    _cpu.pack(codes.data_ptr(), tiles.data_ptr(), bits, n, k, torch.get_num_threads())
    scale, zero = weight.scale, weight.zero_point
    if zero is not None and zero.is_floating_point():  # of another dtype, maybe; integers up to 255 are exact in all
        scale, zero = (t.to(torch.promote_types(scale.dtype, zero.dtype)) for t in (scale, zero))
    scales, zeros = _in_blocks(scale), None if zero is None else _in_blocks(zero.to(scale.dtype))
    weight_parts = LaidOut(part for part in (tiles, scales, zeros, *more) if part is not None)
    weight_parts.weight = described(tiles, scales, zeros, bits, n)
    return weight_parts


class _Room:
    """Memory in large pages, some megabytes at a time, given out piece by piece: a core that waits for addresses does not
    read, and scales in small pages would make it wait as often as codes do. A piece keeps its mapping alive, nothing else does."""

    def __init__(self) -> None:
        self.lock, self.used = Lock(), 0
        self.last: Callable[[], mmap.mmap | None] = lambda: None

    def take(self, size: int) -> Tensor:
        """``size`` bytes, uint8, not set to anything."""
        if size == 0 or not LARGE_PAGES:
            return torch.empty(size, dtype=torch.uint8)
        with self.lock:
            room = self.last()
            if room is None or self.used + size > len(room):
                room, self.used = _mapped(max(size, MAPPED)), 0
                self.last = weakref.ref(room)
            piece = torch.frombuffer(room, dtype=torch.uint8, count=size, offset=self.used)
            self.used += -(-size // 64) * 64
        return piece


def _mapped(size: int) -> mmap.mmap:
    room = mmap.mmap(-1, -(-size // LARGE) * LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a hint: this kernel may have no such pages
        room.madvise(mmap.MADV_HUGEPAGE)
    return room


_room = _Room()


def output(x: Tensor, weight: bytes) -> tuple[int, Tensor]:
    """How many rows ``x [..., K]`` has, and room for its product with a weight that was `described`, ``[..., N]``."""
    shape, (n, k) = x.shape, _sizes(weight, SIZES_AT)
    if not shape or shape[-1] != k:
        raise KernelError(f"x has {shape[-1] if shape else 'no'} columns, the weight has {k}")
    m = x.numel() // k
    if len(shape) == 2:
        return m, empty_on_cpu((m, n), (n, 1), x.dtype)
    sizes, strides = (*shape[:-1], n), [1]
    for size in sizes[:0:-1]:
        strides.append(strides[-1] * size)
    return m, empty_on_cpu(sizes, tuple(strides[::-1]), x.dtype)


def portable(tiles: Tensor, spec: LinearSpec) -> Tensor:
    """The codes back in the portable layout, bit for bit."""
    n, k, bits = spec.out_features, spec.in_features, spec.scheme.bits
    codes = tiles.new_empty(n, k // 8 * bits)
    _cpu.unpack(tiles.data_ptr(), codes.data_ptr(), bits, n, k, torch.get_num_threads())
    return codes


def _in_blocks(values: Tensor) -> Tensor:
    """``[N, G]`` to ``[ceil(N / 16), G, 16]``, float32 or bf16."""
    n, g = values.shape
    dtype = torch.bfloat16 if values.dtype is torch.bfloat16 else torch.float32
    blocks = _room.take((n + 15) // 16 * 16 * g * dtype.itemsize).view(dtype).view(-1, g, 16)
    full = n // 16
    blocks[:full] = values[: 16 * full].view(-1, 16, g).transpose(1, 2)
    if full < blocks.shape[0]:
        blocks[full] = 0
        blocks[full, :, : n % 16] = values[16 * full :].t()
    return blocks


SIZES_AT = 40
_sizes = struct.Struct("2q").unpack_from  # N and K of what `described` says


def described(tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int, n: int) -> bytes:
    """What the module wants to know of a weight."""
    k, zero_address = tiles.shape[1] * 32, 0 if zero is None else zero.data_ptr()
    return struct.pack(
        "8q", tiles.data_ptr(), scale.data_ptr(), zero_address, TYPES[scale.dtype], bits, n, k, k // scale.shape[1]
    )


def weight_of(prepared: tuple[Tensor, ...], zero: Tensor | None, bits: int, n: int) -> bytes:
    """What `described` says of a weight, or has said. A part of what a backend holds may come from anywhere and is checked."""
    if isinstance(prepared, LaidOut):
        return prepared.weight
    tiles, scale = prepared[:2]
    checks.native_weight(Arguments("cpu_native_linear", tiles), tiles, scale, zero, bits, n)
    return described(tiles, scale, zero, bits, n)


def dequantized(weight: bytes, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """``(i, j, W[i:j])`` for some rows after others; bf16 if ``dtype`` is that, else float32 cast to ``dtype``."""
    n, k = _sizes(weight, SIZES_AT)
    compute = dtype if dtype is torch.bfloat16 else torch.float32
    rows = max(1, BLOCK // k // 16) * 16
    for i in range(0, n, rows):
        j = min(i + rows, n)
        w = torch.empty(j - i, k, dtype=compute)
        _cpu.dequantize(weight, i // 16, (j + 15) // 16, w.data_ptr(), TYPES[compute], torch.get_num_threads())
        yield i, j, w.to(dtype)


@implements("cpu_native_linear_backward")
def backward(grad: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``grad [M, N]`` times W: ``[M, K]``; blocks of W are added up in float32 at least."""
    dtype = compute_dtype(grad)
    out = grad.new_zeros(grad.shape[0], tiles.shape[1] * 32, dtype=torch.promote_types(dtype, torch.float32))
    wide = grad.to(dtype)
    with as_asked("cpu"):
        for i, j, w in dequantized(described(tiles, scale, zero, bits, grad.shape[1]), dtype):
            out += wide[:, i:j] @ w
    return out.to(grad.dtype)
