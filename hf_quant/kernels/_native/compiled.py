"""The compiled module of ``hf_quant/kernels/_native/csrc``, and weights in its layout, for all backends that call it.

HF_QUANT_CPU_LEVEL limits the instruction set: portable, avx2, avx512, vnni, bf16 or amx; on ARM portable, dotprod, i8mm or bf16.
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
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.coded_scales import CodedScales
from hf_quant.core.layout import coded_parts, scale_parts
from hf_quant.core.private_torch import empty_on_cpu
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import BackendError, KernelError
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._native.scales import Scales
from hf_quant.kernels._native.sources import digest
from hf_quant.kernels._shared.blocks import BLOCK, as_asked, compute_dtype
from hf_quant.kernels._shared.ops import implements

try:
    from hf_quant.kernels import _cpu as _cpu
except ImportError:  # not built; `why_not` reports it
    _cpu = None  # type: ignore[assignment]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STORED, ONE = TYPES | {torch.uint8: 3}, 4  # types of scales in csrc/cpu.h, the last one number for all
LARGE, MAPPED = 2 << 20, 64 << 20  # bytes of a large page, and of what is mapped at a time
LARGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE") and os.environ.get("HF_QUANT_LARGE_PAGES") != "0"
ARM = platform.machine().lower() in ("aarch64", "arm64")
LEVELS = ("portable", "dotprod", "i8mm", "bf16") if ARM else ("portable", "avx2", "avx512", "vnni", "bf16", "amx")
BYTES = ("dotprod", "i8mm", "vnni", "bf16", "amx")  # levels that have products of bytes


def check_sources(module: Any) -> None:
    """Raises `BackendError` where a module was compiled from other sources than those that lie here."""
    sources = digest()
    if sources and getattr(module, "sources", lambda: None)() != sources:
        root = Path(__file__).parents[3]
        raise BackendError(f"the compiled kernels are not of the sources in {root}: run pip install -e . there again")


if _cpu is not None:
    check_sources(_cpu)
    if wanted := os.environ.get("HF_QUANT_CPU_LEVEL"):
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
        scale: float32, bf16 or float16 ``[ceil(N / 16), G, 16]``, or ``[1, 1, 1]`` where all are the same; uint8 in two levels.
        zero: Zero points like ``scale``, integers as uint8, or None where all are ``2 ** (bits - 1)``; in two levels offsets.
        subtracted: Whether ``zero`` is subtracted from scaled codes, not from codes.
        units: float32 ``[ceil(N / 16), B, 16]`` each, what ``scale`` and ``zero`` are multiples of; empty in one level.
        description: What `described` says of the tensors above, computed once: to look at a tensor takes one percent of
            the product with one row.
    """

    tiles: Tensor
    scale: Tensor
    zero: Tensor | None
    subtracted: bool
    units: Units
    description: bytes

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool]:
        """What operations are given of a weight, in their order."""
        return self.tiles, self.scale, self.zero, self.units.scale, self.units.zero, self.subtracted

    def scales(self, spec: LinearSpec) -> dict[str, Tensor]:
        """See `LinearBackend`."""
        scheme, n = spec.scheme, spec.out_features
        if self.scale.numel() == 1:
            return scale_parts(self.scale.view(1, 1).expand(n, 1), None, scheme)
        scale, zero = _in_rows(self.scale, n), None if self.zero is None else _in_rows(self.zero, n)
        if self.units.scale is not None:
            zero_unit = None if self.units.zero is None else _in_rows(self.units.zero, n)
            return coded_parts(CodedScales(scale, _in_rows(self.units.scale, n), zero, zero_unit), scheme)
        if zero is not None and self.subtracted:
            zero = zero.float() / scale.float()
        return scale_parts(scale, zero, scheme)


def laid_out(weight: QuantizedTensor, spec: LinearSpec) -> NativeWeight:
    """The weight in the layout of the compiled module."""
    n, k, bits = spec.out_features, spec.in_features, spec.scheme.bits
    codes = weight.qweight.contiguous()
    tiles = _room.take((n + 15) // 16 * 2 * k * bits).view(-1, k // 32, 64 * bits)
    _cpu.pack(codes.data_ptr(), tiles.data_ptr(), bits, n, k, torch.get_num_threads())
    held, units = Scales.of(weight), Units()
    if weight.coded is not None:
        units = Units(
            *(
                None if unit is None else _in_blocks(unit.float())
                for unit in (weight.coded.unit, weight.coded.offset_unit)
            )
        )
    scale = held.scale.view(1, 1, 1) if held.scale.ndim == 1 else _in_blocks(held.scale)
    zero = None if held.zero is None else _in_blocks(held.zero)
    operands = (tiles, scale, zero, units.scale, units.zero, held.subtracted)
    return NativeWeight(tiles, scale, zero, held.subtracted, units, described(*operands, bits, n))


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


_room, _scratch = _Room(), _Room()  # of weights, and of what goes sooner


def scratch(size: int) -> Tensor:
    """``size`` uninitialized bytes for a tensor that does not stay, uint8, in large pages if it is large."""
    return _scratch.take(size) if size >= LARGE // 4 else torch.empty(size, dtype=torch.uint8)


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
    """``[N, G]`` to ``[ceil(N / 16), G, 16]``."""
    n, g = values.shape
    blocks = _room.take((n + 15) // 16 * 16 * g * values.itemsize).view(values.dtype).view(-1, g, 16)
    values = values.contiguous()
    _cpu.blocks(values.data_ptr(), blocks.data_ptr(), values.itemsize, n, g, torch.get_num_threads())
    return blocks


def _in_rows(blocks: Tensor, n: int) -> Tensor:
    """Inverse of `_in_blocks`."""
    return blocks.transpose(1, 2).flatten(0, 1)[:n].contiguous()


SIZES_AT = 40
_sizes = struct.Struct("2q").unpack_from  # N and K of what `described` says


def described(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, unit: Tensor | None, zero_unit: Tensor | None, subtracted: bool,
    bits: int, n: int,
) -> bytes:  # fmt: skip
    """The address, shapes and types of a weight, as the compiled module reads them."""
    k = tiles.shape[1] * 32
    kind = ONE if scale.numel() == 1 else STORED[scale.dtype]
    shift = 0 if unit is None else (scale.shape[1] // unit.shape[1]).bit_length() - 1
    return struct.pack(
        "13q", tiles.data_ptr(), scale.data_ptr(), _address(zero), kind, bits, n, k, k // scale.shape[1],
        _address(unit), _address(zero_unit), shift, 0 if zero is None else STORED[zero.dtype], subtracted,
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
def backward(
    grad: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, unit: Tensor | None, zero_unit: Tensor | None,
    subtracted: bool, bits: int,
) -> Tensor:  # fmt: skip
    """``grad [M, N]`` times W: ``[M, K]``; blocks of W are summed in float32 or a finer dtype."""
    dtype = compute_dtype(grad)
    out = grad.new_zeros(grad.shape[0], tiles.shape[1] * 32, dtype=torch.promote_types(dtype, torch.float32))
    wide, weight = grad.to(dtype), described(tiles, scale, zero, unit, zero_unit, subtracted, bits, grad.shape[1])
    with as_asked("cpu"):
        for i, j, w in dequantized(weight, dtype):
            out += wide[:, i:j] @ w
    return out.to(grad.dtype)
