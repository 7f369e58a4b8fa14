"""Gemma 4 for mobile devices ("wNa8o8"): integers of 2, 4 and 8 bits with one scale a row, inputs rounded to INT8 by a stored scale.

As transformers reads it (``integrations/gemma_quant.py``). A scale of activations that is 0 means that inputs are not rounded. Outputs
are not rounded here, and the caches of keys and values neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Called, Headers, Layer, Value, by_itself
from hf_quant.formats._common import (
    FLOATS,
    MAX_GLOBS,
    ReadOnly,
    check_input_scale,
    check_scale,
    each_layer,
    integer,
    need,
    refused,
    scheme_for,
)

WIDTHS = (2, 4, 8)
INPUTS, OUTPUTS = "input_activation_scale", "output_activation_scale"
TABLE, TABLE_SCALE = "embedding_quantized", "embedding_scale"
NOTE = "outputs are not rounded, as they are where it was trained"
# literals, digits, ranges of digits, and alternatives; a repeated digit ends before a dot, so that no name takes long to match
_PATTERN = re.compile(r"\^?([\w-]|\\\.|\\d(?!\+)|\\d\+(?=\\\.|\$?$)|\[\d-\d\]|[(|)])*\$?")
MOST_ALTERNATIVES = 10


@dataclass(frozen=True)
class Gemma(ReadOnly):
    """weight uint8 ``[N, K / 8 * bits]`` or int8 ``[N, K]``, weight_scale ``[N, 1]``; embedding_quantized and embedding_scale alike.

    Args:
        bits: Of modules that no pattern matches.
        patterns: In their order, with the bits of the modules whose names they are found in.
    """

    bits: int = 4
    patterns: tuple[tuple[re.Pattern[str], int], ...] = ()

    label: ClassVar[str] = "gemma"
    methods: ClassVar[tuple[str, ...]] = ("gemma",)
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", INPUTS, OUTPUTS, TABLE, TABLE_SCALE)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Gemma | None:
        if config.get("quant_method") != "gemma":
            return None
        bits, entries = integer(config, "num_bits", WIDTHS, 4), config.get("module_quant_configs") or {}
        if not isinstance(entries, Mapping) or len(entries) > MAX_GLOBS:
            raise refused("module_quant_configs", entries, f"must be an object of at most {MAX_GLOBS} patterns")
        return cls(bits, tuple(_entry(pattern, entry, bits) for pattern, entry in entries.items()))

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        codes, scales = (TABLE, TABLE_SCALE) if TABLE in tensors else ("weight", "weight_scale")
        _shape(tensors, codes, scales, scheme.bits)
        check_scale(scales, tensors[scales])
        packed = tensors[codes].contiguous()
        if scheme.bits == 8:
            packed = packed.view(torch.uint8) ^ 0x80
        ranges = None
        if scheme.activations:
            ranges = need(tensors, INPUTS, FLOATS).reshape(1)
            check_input_scale(INPUTS, ranges)
        return QuantizedTensor(packed, tensors[scales].contiguous(), None, scheme, input_scale=ranges)

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda module, tensors: self._layer(module, called(module), tensors, value))

    def _layer(self, module: str, names: Sequence[str], tensors: Mapping[str, Any], value: Value) -> Layer | None:
        bits = next((bits for pattern, bits in self.patterns if any(map(pattern.search, names))), self.bits)
        if TABLE in tensors:
            n, k, groups = _shape(tensors, TABLE, TABLE_SCALE, bits)
            size = -1 if groups == 1 else k // groups
            return Layer((n, k), _scheme(bits, size, k), tensors[TABLE_SCALE].dtype)
        if "weight_scale" not in tensors and ("weight" not in tensors or tensors["weight"].dtype in FLOATS):
            return None
        n, k, groups = _shape(tensors, "weight", "weight_scale", bits)
        if groups != 1:
            raise FormatError(f"weight_scale has shape {[n, groups]}, expected {[n, 1]}")
        rounds = _calibrated(tensors, value(f"{module}.{INPUTS}"))
        scheme = _scheme(bits, -1, k, activations="tensor" if rounds else None)
        return Layer((n, k), scheme, tensors["weight_scale"].dtype, NOTE if OUTPUTS in tensors else "")


def _entry(pattern: str, entry: Any, bits: int) -> tuple[re.Pattern[str], int]:
    """A pattern and its bits; only patterns that match any name at once."""
    where = f"module_quant_configs.{pattern[:80]}"
    if not isinstance(entry, Mapping):
        raise refused(where, entry, "must be an object")
    if len(pattern) > 200 or pattern.count("|") > MOST_ALTERNATIVES or not _PATTERN.fullmatch(pattern):
        raise refused(where, pattern, "of regular expressions only literals, digits and few alternatives are read")
    try:
        return re.compile(pattern), integer(entry, "num_bits", WIDTHS, bits)
    except re.error as error:
        raise refused(where, pattern, str(error)) from None


def _scheme(bits: int, size: int, k: int, **kind: Any) -> QuantScheme:
    scheme = scheme_for(bits, size, k, True, **kind)
    if scheme is None or (size not in (-1, k) and scheme.group_size != size):
        raise FormatError(f"rows of {k} in groups of {size} are not read, only multiples of 32")
    return scheme


def _shape(tensors: Mapping[str, Any], codes: str, scales: str, bits: int) -> tuple[int, int, int]:
    """N, K and the number of groups, of tensors that fit each other."""
    n, width = need(tensors, codes, (torch.int8,) if bits == 8 else (torch.uint8,), (None, None)).shape
    k, groups = width * 8 // bits, need(tensors, scales, FLOATS, (n, None)).shape[1]
    if k % groups:
        raise FormatError(f"{scales} has {groups} groups for {k} columns")
    return n, k, groups


def _calibrated(tensors: Mapping[str, Any], scale: Tensor | None) -> bool:
    """Whether inputs are rounded."""
    if INPUTS not in tensors:
        return False
    if scale is None or scale.numel() != 1 or scale.dtype not in FLOATS:
        raise FormatError(f"{INPUTS} has shape {list(tensors[INPUTS].shape)}, expected one floating-point value")
    if scale.item() == 0:
        return False
    check_input_scale(INPUTS, scale)
    return True


FORMAT = Gemma
