"""The compiled module of ``hf_quant/kernels/_native/csrc``, and weights in its layout, for all backends that call it.

HF_QUANT_CPU_LEVEL limits the instruction set: portable, avx2, avx512, vnni, bf16 or amx; on ARM portable or dotprod.
HF_QUANT_LARGE_PAGES=0 keeps weights in ordinary memory, which a sanitizer can observe.
"""

from __future__ import annotations

import mmap
import os
import platform
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from hf_quant.core.coded_scales import CodedScales
from hf_quant.core.private_torch import empty_on_cpu
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import BackendError, KernelError
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._shared.blocks import BLOCK, as_asked, compute_dtype
from hf_quant.kernels._shared.ops import implements

try:
    from hf_quant.kernels import _cpu as _cpu
except ImportError:  # not built; `why_not` reports it
    _cpu = None  # type: ignore[assignment]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STORED = TYPES | {torch.uint8: 3}  # of scales
LARGE, MAPPED = 2 << 20, 64 << 20  # bytes of a large page, and of what is mapped at a time
LARGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE") and os.environ.get("HF_QUANT_LARGE_PAGES") != "0"
ARM = platform.machine().lower() in ("aarch64", "arm64")
LEVELS = ("portable", "dotprod") if ARM else ("portable", "avx2", "avx512", "vnni", "bf16", "amx")
BYTES = ("dotprod", "vnni", "bf16", "amx")  # levels that have products of bytes

if _cpu is not None and (wanted := os.environ.get("HF_QUANT_CPU_LEVEL")):
    if wanted not in LEVELS:
        raise BackendError(f"HF_QUANT_CPU_LEVEL must be one of {', '.join(LEVELS)}, got {wanted!r}")
    _cpu.limit(wanted)


def built() -> str | None:
    """The instruction set in use; None if the module is not built."""
    return None if _cpu is None else _cpu.level()


def why_not_built() -> str | None:
    """Why the module is missing, and what brings it; None if it is built."""
    if _cpu is not None:
        return None
    source = Path(__file__).parents[3]
    if (source / "setup.py").is_file():
        return f"hf_quant was imported from its source, {source}: pip install -e . there, or start Python in another folder"
    return "there was no C++ compiler (g++, clang++) when hf_quant was installed: get one and install it again"


def why_not(spec: LinearSpec) -> str | None:
    """Why a weight cannot have this layout; None if it can."""
    if spec.device != "cpu":
        return f"needs a CPU, got {spec.device}"
    if (reason := why_not_built()) is not None:
        return f"not compiled: {reason}"
    if spec.dtype not in TYPES:
        return f"float32 at most, too coarse for {spec.dtype}"
    if spec.scheme.codebook:
        return "integers only, no codebooks"
    if spec.scheme.blocks and spec.scheme.symmetric:
        return f"bytes of {spec.scheme.blocks} for scales have a sign"
    if spec.in_features // spec.scheme.groups(spec.in_features) % 32:
        return f"group size {spec.scheme.group_size} is not a multiple of 32"
    return None


@dataclass(frozen=True, slots=True)
class Units:
    """What bytes of scales and of offsets are multiples of, float32 ``[ceil(N / 16), B, 16]`` each; None in one level."""

    scale: Tensor | None = None
    zero: Tensor | None = None


@dataclass(frozen=True, slots=True)
class NativeWeight:
    """A weight ``[N, K]`` in the layout of ``csrc/cpu.h``, in memory that nothing moves.

    Attributes:
        tiles: uint8 ``[ceil(N / 16), K / 32, 64 bits]``, the codes.
        scale: float32 or bf16 ``[ceil(N / 16), G, 16]``; uint8 in two levels.
        zero: Zero points like ``scale``, or None where all are ``2 ** (bits - 1)``; in two levels offsets.
        units: float32 ``[ceil(N / 16), B, 16]`` each, what ``scale`` and ``zero`` are multiples of; empty in one level.
        description: What `described` says of the tensors above, computed once: to look at a tensor takes one percent of
            the product with one row.
    """

    tiles: Tensor
    scale: Tensor
    zero: Tensor | None
    units: Units
    description: bytes

    def in_one_level(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points in floating point."""
        if self.units.scale is None:
            return self.scale, self.zero
        scale = _spread(self.scale, self.units.scale)
        return scale, None if self.zero is None else _spread(self.zero, self.units.zero) / scale

    def codes_of_scales(self, n: int) -> dict[str, Tensor]:
        """uint8 ``[N, G]`` by the name of the field of `CodedScales`; empty in one level."""
        if self.units.scale is None:
            return {}
        given = {"code": self.scale} | ({} if self.zero is None else {"offset": self.zero})
        return {name: part.transpose(1, 2).flatten(0, 1)[:n].contiguous() for name, part in given.items()}


def _spread(codes: Tensor, units: Tensor | None) -> Tensor:
    assert units is not None
    return codes.float() * units.repeat_interleave(codes.shape[1] // units.shape[1], 1)


def laid_out(weight: QuantizedTensor, spec: LinearSpec) -> NativeWeight:
    """The weight in the layout of the compiled module."""
    n, k, bits = spec.out_features, spec.in_features, spec.scheme.bits
    codes = weight.qweight.contiguous()
    tiles = _room.take((n + 15) // 16 * 2 * k * bits).view(-1, k // 32, 64 * bits)
    _cpu.pack(codes.data_ptr(), tiles.data_ptr(), bits, n, k, torch.get_num_threads())
    if weight.coded is not None:
        return _coded(tiles, weight.coded, spec)
    scale, zero = weight.scale, weight.zero_point
    if zero is not None and zero.is_floating_point():  # of another dtype, maybe; integers up to 255 are exact in all
        scale, zero = (t.to(torch.promote_types(scale.dtype, zero.dtype)) for t in (scale, zero))
    scales, zeros = _in_blocks(scale), None if zero is None else _in_blocks(zero.to(scale.dtype))
    return NativeWeight(tiles, scales, zeros, Units(), described(tiles, scales, zeros, bits, n))


def _coded(tiles: Tensor, scales: CodedScales, spec: LinearSpec) -> NativeWeight:
    codes, offsets = _in_blocks(scales.code), None if scales.offset is None else _in_blocks(scales.offset)
    units = Units(_in_blocks(scales.unit), None if scales.offset_unit is None else _in_blocks(scales.offset_unit))
    description = described(tiles, codes, offsets, spec.scheme.bits, spec.out_features, units)
    return NativeWeight(tiles, codes, offsets, units, description)


class _Room:
    """Memory in large pages, allocated in chunks of some megabytes. With small pages, a core waits for address translation instead of
    reading, for scales as often as for codes. A chunk is freed with the last tensor in it."""

    def __init__(self) -> None:
        self.lock, self.used = Lock(), 0
        self.last: Callable[[], mmap.mmap | None] = lambda: None

    def take(self, size: int) -> Tensor:
        """``size`` uninitialized bytes, uint8."""
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
    with suppress(OSError):  # a hint, which the system may not know
        room.madvise(mmap.MADV_HUGEPAGE)
    return room


_room = _Room()


def output(x: Tensor, weight: bytes) -> tuple[int, Tensor]:
    """The number of rows of ``x [..., K]``, and an uninitialized tensor for its product with a `described` weight, ``[..., N]``."""
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


@torch.compiler.disable  # Dynamo warns of extensions that it cannot trace
def portable(tiles: Tensor, spec: LinearSpec) -> Tensor:
    """The codes in the portable layout, bit for bit."""
    n, k, bits = spec.out_features, spec.in_features, spec.scheme.bits
    codes = tiles.new_empty(n, k // 8 * bits)
    _cpu.unpack(tiles.data_ptr(), codes.data_ptr(), bits, n, k, torch.get_num_threads())
    return codes


def _in_blocks(values: Tensor) -> Tensor:
    """``[N, G]`` to ``[ceil(N / 16), G, 16]``, float32, bf16 or uint8."""
    n, g = values.shape
    dtype = values.dtype if values.dtype in (torch.bfloat16, torch.uint8) else torch.float32
    blocks = _room.take((n + 15) // 16 * 16 * g * dtype.itemsize).view(dtype).view(-1, g, 16)
    full = n // 16
    blocks[:full] = values[: 16 * full].view(-1, 16, g).transpose(1, 2)
    if full < blocks.shape[0]:
        blocks[full] = 0
        blocks[full, :, : n % 16] = values[16 * full :].t()
    return blocks


SIZES_AT = 40
_sizes = struct.Struct("2q").unpack_from  # N and K of what `described` says


def described(
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    n: int,
    units: Units = Units(),
) -> bytes:
    """The address, shapes and types of a weight, as the compiled module reads them."""
    k, zero_address = tiles.shape[1] * 32, 0 if zero is None else zero.data_ptr()
    at, above, shift = 0, 0, 0
    if units.scale is not None:
        at, shift = units.scale.data_ptr(), (scale.shape[1] // units.scale.shape[1]).bit_length() - 1
        above = 0 if units.zero is None else units.zero.data_ptr()
    return struct.pack(
        "11q", tiles.data_ptr(), scale.data_ptr(), zero_address, STORED[scale.dtype], bits, n, k, k // scale.shape[1],
        at, above, shift,
    )  # fmt: skip


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
    """``grad [M, N]`` times W: ``[M, K]``; blocks of W are summed in float32 or a finer dtype."""
    dtype = compute_dtype(grad)
    out = grad.new_zeros(grad.shape[0], tiles.shape[1] * 32, dtype=torch.promote_types(dtype, torch.float32))
    wide = grad.to(dtype)
    with as_asked("cpu"):
        for i, j, w in dequantized(described(tiles, scale, zero, bits, grad.shape[1]), dtype):
            out += wide[:, i:j] @ w
    return out.to(grad.dtype)
