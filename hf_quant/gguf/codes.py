"""Blocks of llama.cpp as a `QuantizedTensor`, and back: the same codes and scales, or a sentence on why not.

A block holds codes around a fixed center with one float16 scale for 32 weights (Q4_0, Q5_0, Q8_0), or codes with an offset
(Q4_1), or, in K-quants, scales that are small multiples of a float16 shared by 256 weights. So a type whose range holds
``code - zero_point`` holds the weight, also a narrower or an asymmetric one. Scales of larger groups are repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_quant.core.coded_scales import CodedScales
from hf_quant.core.packing import pack
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.core.two_levels import multiples
from hf_quant.errors import FormatError
from hf_quant.gguf.blocks import BLOCKS, Block, Parts

SIMPLE = ("Q4_0", "Q5_0", "Q8_0")  # with a center and no integer scales, the smallest first


def scheme_of(block: Block, *, integer_zero: bool = False) -> QuantScheme:
    """The scheme that holds blocks of a type; ``integer_zero``: whether all offsets are codes times scales."""
    symmetric = block.center is not None
    return QuantScheme(block.bits, block.group, symmetric, real_zero=not symmetric and not integer_zero)


def tensor_of(parts: Parts, block: Block) -> QuantizedTensor:
    """The weight of these blocks, to the last bit; beside real zero points, to the rounding of float32."""
    if block.scales:
        return _two_levels(parts, block)
    scale = parts.d
    offset, dead = parts.offset(), scale == 0
    legal = torch.where(dead, 1, scale)  # a group of one value may have a scale of zero
    if offset is None:
        scheme = scheme_of(block)
        codes = parts.codes.masked_fill(_by_weight(dead, block), scheme.zero)
        return QuantizedTensor(pack(codes, scheme.bits), legal, None, scheme)
    zero = (offset / scale.float()).nan_to_num(0, 0, 0)
    whole = zero.round()
    exact = (whole * scale.float() == offset) & (whole >= 0) & (whole < 1 << block.bits) & (scale != 0)
    if bool(exact.all()):
        scheme = scheme_of(block, integer_zero=True)
        return QuantizedTensor(pack(parts.codes, scheme.bits), scale, whole.to(torch.uint8), scheme)
    scheme, legal = scheme_of(block), legal.float()
    codes = parts.codes.masked_fill(_by_weight(dead, block), 0)
    return QuantizedTensor(pack(codes, scheme.bits), legal, offset / legal, scheme)


def _two_levels(parts: Parts, block: Block) -> QuantizedTensor:
    """The same for K-quants, whose scales and offsets stay whole numbers."""
    assert parts.scales is not None
    scheme = QuantScheme.of_blocks(block.name)
    assert scheme.k_quant is not None
    unit = torch.where(parts.d == 0, 1, parts.d)
    dead = (parts.scales == 0) | (parts.d == 0)[..., None]  # such a group gets a legal scale, and codes of zero
    scales = torch.where(dead, 1, parts.scales) - scheme.k_quant.scales[0]
    zero = 0 if block.center is None else scheme.zero
    codes = parts.codes.masked_fill(_by_weight(dead.flatten(1), block), zero)
    coded = CodedScales(scales.to(torch.uint8).flatten(1), unit)
    if parts.offsets is not None and parts.dmin is not None:
        coded = replace(coded, offset=parts.offsets.to(torch.uint8).flatten(1), offset_unit=parts.dmin)
    return QuantizedTensor.from_coded(pack(codes, scheme.bits), coded, scheme)


def _by_weight(groups: Tensor, block: Block) -> Tensor:
    """A value of every group, for every weight."""
    return groups.repeat_interleave(block.group, 1)


@dataclass(frozen=True)
class Fit:
    """A weight in blocks."""

    block: Block
    parts: Parts


def blocks_of(tensor: QuantizedTensor) -> Fit:
    """A weight ``[N, K]`` in blocks of the smallest type that holds it.

    Raises:
        FormatError: None does; the sentence says why.
    """
    scheme = tensor.scheme
    if (reason := why_not(scheme)) is not None:
        raise FormatError(reason)
    if scheme.real_zero and scheme.bits == 4 and not scheme.blocks:
        return _four_bits(tensor)
    if scheme.real_zero or scheme.group_size == 16:
        return _k_quant(tensor)
    groups = max(1, tensor.in_features // 32 // tensor.scale.shape[-1])
    scale = tensor.scale.half()
    if not torch.equal(scale.float(), tensor.scale.float()):
        if (fit := _perhaps_k_quant(tensor)) is not None:
            return fit
        raise FormatError("its scales need more than float16 holds, in which GGUF stores them")
    scale = scale.repeat_interleave(groups, -1)
    zeros = tensor.zeros().repeat_interleave(groups, -1)
    if scheme.bits == 4 and not scheme.symmetric:
        offset = -(zeros.float() * scale.float())
        if torch.equal(offset.half().float(), offset):
            return Fit(BLOCKS["Q4_1"], Parts(tensor.codes(), scale, dmin=offset.half()))
    signed = tensor.codes().short() - zeros.short().repeat_interleave(32, -1)
    least, most = int(signed.min()), int(signed.max())
    for name in SIMPLE:
        block = BLOCKS[name]
        assert block.center is not None
        if -block.center <= least and most < block.center:
            return Fit(block, Parts((signed + block.center).to(torch.uint8), scale))
    raise FormatError(f"code - zero_point reaches from {least} to {most}, and Q8_0 holds -128 to 127")


def why_not(scheme: QuantScheme) -> str | None:
    """Why no type of GGUF holds a scheme, or None where one may; the scales decide then."""
    if scheme.codebook:
        return f"GGUF has no type for a codebook of {scheme.bits} bits ({scheme.codebook})"
    if scheme.permuted:
        return f"blocks of GGUF hold columns in their natural order, and these {scheme.bits}-bit codes have another"
    if scheme.padding:
        return f"GGUF has no place for {scheme.padding} zero columns behind a layer's own, which the native format has"
    if scheme.activations in ("tensor", "threshold"):
        return f"GGUF has no place for how {scheme} rounds activations; W8A8, each row by its own range, is held"
    if scheme.outliers:
        return f"GGUF has no place for outliers beside the {scheme.bits}-bit codes"
    if scheme.real_zero and (scheme.bits, scheme.group_size) not in ((2, 16), (4, 32), (5, 32)):
        return f"real zero points are held in 2 bits in groups of 16, in 4 and 5 in groups of 32 (Q2_K, Q4_K, Q5_K), not as {scheme}"
    return None


def _four_bits(tensor: QuantizedTensor) -> Fit:
    """A weight of 4 bits with real zero points as Q4_K, or as Q4_1 where scales and offsets of float16 make the same weights."""
    if (fit := _perhaps_k_quant(tensor)) is not None:
        return fit
    assert tensor.zero_point is not None
    block, scale = BLOCKS["Q4_1"], tensor.scale.half()
    offset = -(tensor.zero_point.float() * scale.float()).half()
    parts = Parts(tensor.codes(), scale, dmin=offset)
    halves = torch.equal(scale.float(), tensor.scale.float()) and bool(offset.isfinite().all())
    if halves and torch.equal(tensor_of(parts, block).dequantize(torch.float32), tensor.dequantize(torch.float32)):
        return Fit(block, parts)
    raise FormatError(
        "GGUF holds real zero points in 4 bits as Q4_1, with scales and offsets of float16, or as Q4_K, with scales that are "
        f"multiples of one float16 for every 256 columns, and those of this {tensor.scheme} are neither"
    )


def _perhaps_k_quant(tensor: QuantizedTensor) -> Fit | None:
    try:
        return _k_quant(tensor)
    except FormatError:
        return None


def _k_quant(tensor: QuantizedTensor) -> Fit:
    """A weight whose scales are multiples of a float16 shared by 256 columns, as such blocks."""
    scheme, n = tensor.scheme, tensor.scale.shape[0]
    for block in BLOCKS.values():
        mine = (
            block.scales
            and scheme.blocks in (None, block.name)
            and block.bits == scheme.bits
            and block.group == scheme.group_size
        )
        if not mine or (block.center is None) != scheme.real_zero or tensor.in_features % block.weights:
            continue
        codes = tensor.codes()
        scale = tensor.scale.float().view(n, -1, block.groups)
        least, most = _range(block)
        if (whole := multiples(scale, least, most)) is None:
            continue
        d, scales = whole
        if block.center is not None:
            return Fit(block, Parts(codes, d, scales))
        assert tensor.zero_point is not None
        zero = tensor.zero_point.float().view_as(scale)
        if (offsets := multiples(zero.double() * scale.double(), 0, most, scale, zero)) is not None:
            return Fit(block, Parts(codes, d, scales, *offsets))
    raise FormatError(
        f"GGUF holds groups of 16 columns, and real zero points, only as K-quants, and the scales of {scheme} are not "
        "multiples of one float16 for every 256 columns"
    )


def _range(block: Block) -> tuple[int, int]:
    """The least and the largest integer scale."""
    width = sum(plane.width for plane in block.scales)
    return -block.zero_scale, (1 << width) - 1 - block.zero_scale
