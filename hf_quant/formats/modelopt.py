"""NVIDIA ModelOpt: NVFP4, MXFP4, INT4 and INT8 codes, and 8-bit floats, which are read to floating point.

As ``export_hf_checkpoint`` writes them (``modelopt/torch/export``). The dtypes of a layer's tensors tell how it is coded, so layers
of one checkpoint may differ. AWQ and SmoothQuant multiply the inputs of some layers by ``pre_quant_scale``, one value for each
column: these layers become floating point, with the columns of their weights multiplied instead. Inputs are rounded to INT8 where
the program does that and there is no such scale; where it rounds them to 8-bit or 4-bit floats, they stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.packing import pack
from hf_quant.core.scheme import MULTIPLE, QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Called, Headers, Layer, Value, by_itself
from hf_quant.formats._common import (
    FLOATS,
    IN_FLOAT,
    ReadOnly,
    check_input_scale,
    check_scale,
    each_layer,
    need,
    one_value,
    scheme_for,
    settled,
    spread,
    times_blocks,
)
from hf_quant.formats._fp4 import MX, NV, mxfp4, nvfp4, powers_of_two

FLOAT8 = torch.float8_e4m3fn
BLOCK = 128  # rows and columns that share a scale, where the weight has blocks
WHOLE, INPUTS, COLUMNS = "weight_scale_2", "input_scale", "pre_quant_scale"
LOW_RANK = ("svdquant_lora_a", "svdquant_lora_b")
READ = {torch.uint8: torch.bfloat16, FLOAT8: torch.float32}  # what scales become that are no floats of 16 bits or more
TWICE = "its activations stay in floating point, and its weights are not rounded to 8-bit floats after their codes"


class ModelOpt(ReadOnly):
    """weight float8 or int8 ``[N, K]``, or uint8 ``[N, K / 2]`` of 4-bit floats and ``[N / 2, K]`` of 4-bit integers; weight_scale."""

    label: ClassVar[str] = "modelopt"
    methods: ClassVar[tuple[str, ...]] = ("modelopt",)
    variant_fields: ClassVar[tuple[str, ...]] = ("quant_algo",)
    config_file: ClassVar[str | None] = "hf_quant_config.json"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight_scale", WHOLE, INPUTS, COLUMNS, *LOW_RANK, "k_scale", "v_scale", "k_bias", "v_bias", "weight",
    )  # fmt: skip

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelOpt | None:
        return cls() if config.get("quant_method") == "modelopt" else None

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        _codes(tensors)
        if scheme.codebook:
            return _fp4(tensors, scheme)
        return _int8(tensors, scheme) if scheme.bits == 8 else _int4(tensors, scheme)

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if tensors["weight"].is_floating_point():  # 8-bit floats, which transformers before 5.21 has cast
            weight = _floats(tensors)
        else:
            _, scheme, _ = _codes(tensors)
            weight = self.read(tensors, scheme).dequantize(torch.float32)
        if COLUMNS not in tensors:
            return weight
        columns = need(tensors, COLUMNS, FLOATS, (weight.shape[1],))
        check_scale(COLUMNS, columns)
        return weight * columns.float()

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda _module, tensors: _layer(tensors))


def _layer(tensors: Mapping[str, Any]) -> Layer | None:
    """A layer, from its headers; None for one in floating point."""
    if low_rank := [name for name in LOW_RANK if name in tensors]:
        raise FormatError(f"{low_rank[0]}: a product of two small matrices beside the codes (NVFP4_SVD) is not read")
    if "weight_scale" not in tensors and ("weight" not in tensors or tensors["weight"].dtype in FLOATS):
        return None
    weight = need(tensors, "weight", (FLOAT8, torch.int8, torch.uint8), (None, None))
    scale_dtype = need(tensors, "weight_scale", (*FLOATS, FLOAT8, torch.uint8)).dtype
    if weight.dtype == FLOAT8:
        _grid(tensors)
        return Layer(tuple(weight.shape), None, scale_dtype, "8-bit floats")
    shape, scheme, note = _codes(tensors)
    if COLUMNS in tensors:
        need(tensors, COLUMNS, FLOATS, (shape[1],))
        return Layer(shape, None, torch.float32, f"its inputs are multiplied by {COLUMNS}")
    return Layer(shape, scheme, READ.get(scale_dtype, scale_dtype), note)


def _codes(tensors: Mapping[str, Any]) -> tuple[tuple[int, int], QuantScheme, str]:
    """Shape and scheme of a layer that has codes, from tensors or headers that fit each other; and what of it is left out."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    n, k = weight.shape
    note = IN_FLOAT if INPUTS in tensors else ""
    if weight.dtype == torch.int8:
        if list(scale.shape) not in ([n], [n, 1], [1], []):
            raise FormatError(f"weight_scale has shape {list(scale.shape)}, expected {[n]}")
        need(tensors, "weight_scale", FLOATS)
        static = INPUTS in tensors and COLUMNS not in tensors
        return (n, k), _scheme(8, -1, k, activations="tensor" if static else None), ""
    groups = need(tensors, "weight_scale", (*FLOATS, FLOAT8, torch.uint8), (None, None)).shape[1]
    if scale.dtype in FLOATS:
        need(tensors, "weight_scale", FLOATS, (2 * n, None))
        if k % groups:
            raise FormatError(f"weight_scale has {groups} groups for {k} columns")
        return (2 * n, k), _scheme(4, k // groups, k), TWICE if WHOLE in tensors else note
    k, size = 2 * k, MX if scale.dtype == torch.uint8 else NV
    need(tensors, "weight_scale", (scale.dtype,), (n, None))
    if k % MULTIPLE or k % groups or (k // groups != MX if size == MX else (k // groups) % NV):
        raise FormatError(
            f"weight_scale has {groups} groups for {k} columns, expected one for {size} of a multiple of {MULTIPLE}"
        )
    if size == NV:
        need(tensors, WHOLE, (torch.float32,))
    return (n, k), QuantScheme(4, size, codebook="e2m1" if size == MX else "nvfp4"), note


def _scheme(bits: int, size: int, k: int, **kind: Any) -> QuantScheme:
    scheme = scheme_for(bits, size, k, True, **kind)
    if scheme is None:
        raise FormatError(
            f"rows of {k} in groups of {size} are not read, only multiples of {MULTIPLE} in groups of 16 and more"
        )
    return scheme


def _int8(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """int8 ``[N, K]``, one scale a row."""
    n = len(tensors["weight"])
    check_scale("weight_scale", tensors["weight_scale"])
    scale = tensors["weight_scale"].reshape(-1, 1).expand(n, 1).contiguous()
    ranges = one_value(tensors, INPUTS) if scheme.activations else None
    if ranges is not None:
        check_input_scale(INPUTS, ranges)
    codes = tensors["weight"].contiguous().view(torch.uint8) ^ 0x80  # -128..127 to 0..255
    return settled(QuantizedTensor(codes, scale, None, scheme, input_scale=ranges))


def _int4(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """Bytes ``[N / 2, K]``, of row 2 i in the low bits and row 2 i + 1 in the high ones, in two's complement."""
    packed, scale = tensors["weight"], tensors["weight_scale"]
    check_scale("weight_scale", scale)
    codes = torch.stack([packed & 15, packed >> 4], 1).flatten(0, 1) ^ 8  # -8..7 to 0..15
    k = codes.shape[1]
    return settled(QuantizedTensor(pack(codes, 4), spread(scale, k, k // scale.shape[1], scheme), None, scheme))


def _fp4(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """Bytes ``[N, K / 2]`` of two codes, the first in the low bits.

    A scale is here divided by its unit, and there multiplied by it: the product may differ in the last bit of a float32.
    """
    codes, stored = tensors["weight"], tensors["weight_scale"]
    if scheme.group_size == MX:
        return mxfp4(codes, stored, scheme)
    unit, k = one_value(tensors, WHOLE).reciprocal(), 2 * codes.shape[1]
    check_input_scale(WHOLE, unit)
    return nvfp4(codes, spread(stored.view(torch.uint8), k, k // stored.shape[1], scheme), unit, scheme)


def _floats(tensors: Mapping[str, Tensor]) -> Tensor:
    """8-bit floats times their scales, float32 ``[N, K]``."""
    weight, scale = tensors["weight"].float(), tensors["weight_scale"]
    if not bool(weight.isfinite().all()):
        raise FormatError("weight: some values are NaN")
    (rows, columns), shape = _grid(tensors)
    scale = powers_of_two("weight_scale", scale) if scale.dtype == torch.uint8 else scale
    check_scale("weight_scale", scale)
    return times_blocks(weight, scale.reshape(shape), rows, columns)


def _grid(tensors: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of 8-bit floats that share a scale, and how many such blocks there are down and across."""
    (n, k), scale = tensors["weight"].shape, tensors["weight_scale"]
    shape, blocks = list(scale.shape), (-(-n // BLOCK), -(-k // BLOCK))
    if scale.dtype == torch.uint8:  # microscaling
        need(tensors, "weight_scale", (torch.uint8,), (n, -(-k // MX)))
        return (1, MX), (n, -(-k // MX))
    need(tensors, "weight_scale", FLOATS)
    if shape in ([], [1]):
        return (n, k), (1, 1)
    if shape in ([n], [n, 1]):
        return (1, k), (n, 1)
    if shape in ([blocks[0], blocks[1]], [blocks[0], 1, blocks[1], 1]):
        return (BLOCK, BLOCK), blocks
    raise FormatError(
        f"weight_scale has shape {shape}, which is neither one scale, nor {n}, nor one for {BLOCK} x {BLOCK} weights"
    )


FORMAT = ModelOpt
