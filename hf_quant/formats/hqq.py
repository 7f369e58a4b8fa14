"""HQQ checkpoints as transformers writes them: integers with real zero points, https://mobiusml.github.io/hqq_blog.

The weight is flattened and cut into groups; a word holds codes that are far apart. With ``axis`` 1 a group is a run of columns,
and the codes are used unchanged. With ``axis`` 0 a group extends over rows, which no kernel here reads, so such layers are
dequantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.packing import pack
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Called, Headers, Layer, Value, by_itself
from hf_quant.formats._common import FLOATS, ReadOnly, check_scale, each_layer, need, scheme_for

NUMBERS = ("nbits", "group_size", "axis")
FLAGS = ("view_as_float", "quant_scale", "quant_zero")
IGNORED = ("packing", "unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
           "channel_wise", "optimize", "round_zero")  # fmt: skip
SHIFTS = {8: (0,), 4: (4, 0), 3: tuple(range(27, -1, -3)), 2: (6, 4, 2, 0)}  # of the codes that share a word
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
WORDS = {8: torch.uint8, 4: torch.uint8, 3: torch.int32, 2: torch.uint8}


@dataclass(frozen=True)
class _Facts:
    shape: tuple[int, int]
    bits: int
    size: int  # of a group, in the flattened weight
    axis: int

    @property
    def groups(self) -> int:
        return math.prod(self.shape) // self.size


class HQQ(ReadOnly):
    """W_q ``[rows, G]`` or ``[rows, size]``, scale and zero ``[G, 1]`` or ``[1, G]``, and a dozen scalars."""

    label: ClassVar[str] = "hqq"
    methods: ClassVar[tuple[str, ...]] = ("hqq",)
    suffixes: ClassVar[tuple[str, ...]] = ("W_q", "scale", "zero", "shape", *NUMBERS, *FLAGS, *IGNORED)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> HQQ | None:
        return cls() if config.get("quant_method") == "hqq" else None

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        facts, codes, scale, zero = _parts(tensors)
        (n, k), wide = facts.shape, scheme.groups(facts.shape[1])
        first = torch.arange(n * wide, device=scale.device) * (k // wide) // facts.size  # group of each of ours
        scale, zero = (part.flatten()[first].view(n, wide) for part in (scale, zero))
        return QuantizedTensor(pack(codes.view(n, k), scheme.bits), scale, zero, scheme)

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        facts, codes, scale, zero = _parts(tensors)
        return ((codes.float() - zero.float()) * scale.float()).view(facts.shape)

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda module, tensors: _layer(tensors, lambda name: value(f"{module}.{name}")))


def _layer(tensors: Mapping[str, Any], value: Value) -> Layer | None:
    if "W_q" not in tensors and "nbits" not in tensors:
        return None  # other modules have a scale too
    facts, dtype = _facts(tensors, value), tensors["scale"].dtype
    if facts.axis == 0:
        return Layer(facts.shape, None, dtype, "HQQ with axis 0: its groups are spread over the rows")
    scheme = scheme_for(facts.bits, facts.size, facts.shape[1], False, real_zero=True)
    note = "" if scheme else f"groups of {facts.size} in rows of {facts.shape[1]} do not divide into legal ones"
    return Layer(facts.shape, scheme, dtype, note)


def _facts(tensors: Mapping[str, Any], value: Value) -> _Facts:
    """The facts in the scalars, checked against the shapes of the tensors beside them."""
    need(tensors, "shape", (torch.int64,), (2,))
    for name in NUMBERS:
        need(tensors, name, (torch.int32,), ())
    shape, bits, size, axis = (_scalars(name, value) for name in ("shape", *NUMBERS))
    n, k = shape
    if bits[0] not in SHIFTS or axis[0] not in (0, 1) or not (0 < n < 1 << 32 and 0 < k < 1 << 32 and size[0] > 0):
        raise FormatError(f"shape {[n, k]}, nbits {bits[0]}, group_size {size[0]}, axis {axis[0]}: out of range")
    if n * k % size[0]:
        raise FormatError(f"group_size {size[0]} does not divide {n} x {k}")
    facts = _Facts((n, k), bits[0], size[0], axis[0])
    flags = {name: bool(_scalars(name, value)[0]) for name in FLAGS if name in tensors}
    if flags.get("quant_scale") or flags.get("quant_zero"):
        raise FormatError("scales or zero points that are quantized again are not read")
    rows, columns = (facts.groups, facts.size) if facts.axis == 1 else (facts.size, facts.groups)
    words = -(-rows // len(SHIFTS[facts.bits]))
    stored = need(tensors, "W_q", (WORDS[facts.bits], *FLOATS) if flags.get("view_as_float") else (WORDS[facts.bits],))
    if math.prod(stored.shape) * stored.dtype.itemsize != words * columns * WORDS[facts.bits].itemsize:
        raise FormatError(f"W_q has shape {list(stored.shape)}, expected {[words, columns]}")
    for name in ("scale", "zero"):
        need(tensors, name, FLOATS, (facts.groups, 1) if facts.axis == 1 else (1, facts.groups))
    return facts


def _scalars(name: str, value: Value) -> list[int]:
    tensor = value(name)
    if tensor is None or not 1 <= tensor.numel() <= 2 or tensor.dtype not in (*FLOATS, *INTEGERS):
        raise FormatError(f"{name} is not a plain number")
    if not bool(tensor.isfinite().all()):
        raise FormatError(f"{name} is not a finite number")
    return [int(number) for number in tensor.flatten()]


def _parts(tensors: Mapping[str, Tensor]) -> tuple[_Facts, Tensor, Tensor, Tensor]:
    """Codes uint8 ``[G, size]`` or ``[size, G]``, and scales and zero points that broadcast against them."""
    facts = _facts(tensors, tensors.get)
    rows, columns = (facts.groups, facts.size) if facts.axis == 1 else (facts.size, facts.groups)
    words = tensors["W_q"].contiguous().view(WORDS[facts.bits]).view(-1, columns)
    mask = (1 << facts.bits) - 1
    codes = torch.cat([(words >> shift) & mask for shift in SHIFTS[facts.bits]])[:rows].to(torch.uint8)
    check_scale("scale", tensors["scale"])
    if not bool(tensors["zero"].isfinite().all()):
        raise FormatError("zero: some zero points are not finite numbers")
    return facts, codes, tensors["scale"], tensors["zero"]


FORMAT = HQQ
