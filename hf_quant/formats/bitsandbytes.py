"""bitsandbytes checkpoints: NF4 and FP4, with or without quantized scales, and LLM.int8.

Four bits: blocks run over the flattened weight, the first of two codes is in the high bits of a byte, and a small JSON text
beside every weight has the other facts. LLM.int8 stores the largest magnitude of each row (SCB); its weights run here in
eight bits with activations in floating point.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.numerics import levels
from hf_quant.core.scheme import THRESHOLD, QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Called, Headers, Layer, Value, by_itself
from hf_quant.formats._common import ReadOnly, check_scale, each_layer, need, refused, scheme_for, settled

BOOKS = ("nf4", "fp4")
STATE = "weight.quant_state.bitsandbytes__"
BLOCKS = tuple(1 << i for i in range(5, 14))
MAX_STATE = 4096  # bytes of JSON
ONE_OF_127 = 0.007874015718698502  # the float32 factor of bitsandbytes


@dataclass(frozen=True)
class _State:
    """The facts in the JSON beside a four-bit weight."""

    codebook: str
    block: int
    shape: tuple[int, int]
    nested_block: int | None
    nested_offset: float


class BitsAndBytes(ReadOnly):
    """weight uint8 ``[N * K / 2, 1]`` with weight.absmax, weight.quant_map, ...; or weight int8 ``[N, K]`` with SCB ``[N]``."""

    label: ClassVar[str] = "bitsandbytes"
    methods: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    suffixes: ClassVar[tuple[str, ...]] = (
        *(f"{STATE}{name}" for name in BOOKS), "weight.nested_quant_map", "weight.nested_absmax", "weight.quant_map",
        "weight.absmax", "weight_format", "SCB", "weight",
    )  # fmt: skip

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> BitsAndBytes | None:
        if config.get("quant_method") != "bitsandbytes":
            return None
        for name in ("load_in_4bit", "load_in_8bit"):
            if type(config.get(name, False)) is not bool:
                raise refused(name, config[name], "must be true or false")
        if not (config.get("load_in_4bit") or config.get("load_in_8bit")):
            raise refused("load_in_4bit", config.get("load_in_4bit"), "it or load_in_8bit must be true")
        return cls()

    def int8_activations(self, config: Mapping[str, Any], scheme: QuantScheme) -> QuantScheme:
        threshold = config.get("llm_int8_threshold", THRESHOLD)
        rounding = {0.0: "token", THRESHOLD: "threshold"}.get(threshold) if type(threshold) in (int, float) else None
        if rounding is None:
            raise refused("llm_int8_threshold", threshold, f"activations='int8' knows {THRESHOLD} and 0 only")
        return replace(scheme, activations=rounding) if scheme.bits == 8 else scheme

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        if "SCB" in tensors:
            return _int8(tensors, scheme)
        state = _state(tensors, tensors.get)
        (n, k), groups = state.shape, scheme.groups(state.shape[1])
        absmax = _absmax(tensors, state)
        first = torch.arange(n * groups, device=absmax.device) * (
            k // groups
        )  # of each group, in the flattened weight
        packed = tensors["weight"].contiguous().view(torch.uint8).view(n, k // 2)
        return QuantizedTensor(
            (packed >> 4) | (packed << 4), absmax[first // state.block].view(n, groups), None, scheme
        )

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if "SCB" in tensors:
            _facts_int8(tensors)
            return tensors["weight"].float() * _scale_int8(tensors)
        state = _state(tensors, tensors.get)
        packed = tensors["weight"].contiguous().view(torch.uint8).flatten()
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten().int()
        table, absmax = levels(state.codebook, codes.device), _absmax(tensors, state)
        scale = absmax.repeat_interleave(state.block)[: len(codes)]
        return (table[codes] * scale).view(state.shape)

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(
            headers, lambda module, tensors: self._layer(module, tensors, value) if _is_coded(tensors) else None
        )

    def _layer(self, module: str, tensors: Mapping[str, Any], value: Value) -> Layer:
        if "SCB" in tensors or ("weight" in tensors and tensors["weight"].dtype is torch.int8):
            n, k = _facts_int8(tensors)
            scheme = scheme_for(8, -1, k, True)
            return Layer(
                (n, k), scheme, torch.float32, "" if scheme else f"{k} input features are not a multiple of 32"
            )
        state = _state(tensors, lambda name: value(f"{module}.{name}"))
        scheme = scheme_for(4, state.block, state.shape[1], True, codebook=state.codebook)
        return Layer(
            state.shape,
            scheme,
            torch.float32,
            "" if scheme else f"{state.shape[1]} input features are not a multiple of 32",
        )


def _facts_int8(tensors: Mapping[str, Any]) -> tuple[int, int]:
    n, k = need(tensors, "weight", (torch.int8,), (None, None)).shape
    scb = need(tensors, "SCB", (torch.float32, torch.float16, torch.bfloat16))
    if math.prod(scb.shape) != n:
        raise FormatError(f"SCB has shape {list(scb.shape)}, expected {n} values")
    return n, k


def _scale_int8(tensors: Mapping[str, Tensor]) -> Tensor:
    layout = tensors.get("weight_format")
    if layout is not None and bool(layout.any()):
        raise FormatError(f"weight_format {layout.flatten()[:4].tolist()}: only weights in rows (0) are read")
    scale = tensors["SCB"].float().view(-1, 1) * ONE_OF_127
    check_scale("SCB", scale)
    return scale


def _int8(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
    _facts_int8(tensors)
    codes = tensors["weight"].contiguous().view(torch.uint8) ^ 0x80  # -128..127 to 0..255
    return settled(QuantizedTensor(codes, _scale_int8(tensors), None, scheme))


def _state(tensors: Mapping[str, Any], value: Value) -> _State:
    """The facts in the JSON, checked against the shapes of the tensors beside it."""
    codebook = next((name for name in BOOKS if STATE + name in tensors), None)
    if codebook is None:
        raise FormatError(f"{STATE}nf4 or {STATE}fp4 is missing")
    stored = need(tensors, STATE + codebook, (torch.uint8,), (None,))
    if stored.shape[0] > MAX_STATE:
        raise FormatError(f"{STATE}{codebook} has {stored.shape[0]} bytes, the limit is {MAX_STATE}")
    text = value(STATE + codebook)
    if text is None:  # too large for a quick look
        raise FormatError(f"{STATE}{codebook}: {stored.shape[0]} bytes are too many")
    state = _parsed(bytes(text.tolist()), codebook)
    n, k = state.shape
    weight = need(tensors, "weight", (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32))
    if math.prod(weight.shape) * weight.dtype.itemsize * 2 != n * k:
        raise FormatError(f"weight has shape {list(weight.shape)} in {weight.dtype}, {n} x {k} in 4 bits expected")
    blocks = -(-n * k // state.block)
    need(tensors, "weight.quant_map", (torch.float32,), (16,))
    if state.nested_block is None:
        need(tensors, "weight.absmax", (torch.float32,), (blocks,))
    else:
        need(tensors, "weight.absmax", (torch.uint8,), (blocks,))
        need(tensors, "weight.nested_absmax", (torch.float32,), (-(-blocks // state.nested_block),))
        need(tensors, "weight.nested_quant_map", (torch.float32,), (256,))
    return state


def _parsed(raw: bytes, codebook: str) -> _State:
    where = STATE + codebook
    try:
        state = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise FormatError(f"{where} holds no valid JSON") from None
    if not isinstance(state, dict) or state.get("quant_type") != codebook:
        raise FormatError(f"{where} does not describe a weight in {codebook}")
    shape, block = state.get("shape"), state.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(s) is int and 0 < s < 1 << 32 for s in shape)):
        raise FormatError(f"{where}: shape {ascii(shape)[:80]} is not that of a matrix")
    nested, offset = state.get("nested_blocksize"), state.get("nested_offset", 0.0)
    if type(block) is not int or block not in BLOCKS:
        raise FormatError(f"{where}: blocksize {ascii(block)[:80]} is not one of {BLOCKS}")
    if nested is not None and (type(nested) is not int or nested not in BLOCKS):
        raise FormatError(f"{where}: nested_blocksize {ascii(nested)[:80]} is not one of {BLOCKS}")
    if type(offset) not in (int, float) or not abs(offset) < 1e38:
        raise FormatError(f"{where}: nested_offset {ascii(offset)[:80]} is not a finite number")
    return _State(codebook, block, (shape[0], shape[1]), nested, float(offset))


def _absmax(tensors: Mapping[str, Tensor], state: _State) -> Tensor:
    """The scale of each block, float32."""
    if not torch.equal(tensors["weight.quant_map"].cpu(), levels(state.codebook, torch.device("cpu"))):
        raise FormatError(f"weight.quant_map: not the levels of {state.codebook}")
    absmax = tensors["weight.absmax"]
    if state.nested_block is not None:
        outer = tensors["weight.nested_absmax"].repeat_interleave(state.nested_block)[: len(absmax)]
        absmax = tensors["weight.nested_quant_map"][absmax.int()] * outer + state.nested_offset
    check_scale("weight.absmax", absmax)
    return absmax


def _is_coded(tensors: Mapping[str, Any]) -> bool:
    return tensors.keys() != {"weight"} or tensors["weight"].dtype in (torch.int8, torch.uint8)


FORMAT = BitsAndBytes
