"""torchao checkpoints with one integer a byte: int8 weight-only, and intx "unpacked to int8".

Other tensors of torchao (tile-packed int4, float8, ...) have the layout of one kernel each and are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.packing import pack
from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Called, Headers, Layer, Value, by_itself
from hf_quant.formats._common import (
    FLOATS,
    ReadOnly,
    check_scale,
    codes_of,
    each_layer,
    need,
    refused,
    scheme_for,
    settled,
    spread,
)

KINDS = ("Int8WeightOnlyConfig", "IntxWeightOnlyConfig")


@dataclass(frozen=True)
class TorchAO(ReadOnly):
    """_weight_qdata int8 ``[N, K]``, _weight_scale and _weight_zero_point ``[N, G]``."""

    bits: int = 8
    symmetric: bool = True

    label: ClassVar[str] = "torchao"
    methods: ClassVar[tuple[str, ...]] = ("torchao",)
    suffixes: ClassVar[tuple[str, ...]] = ("_weight_zero_point", "_weight_qdata", "_weight_scale")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TorchAO | None:
        if config.get("quant_method") != "torchao":
            return None
        kind = config.get("quant_type")
        kind = kind.get("default") if isinstance(kind, dict) and set(kind) == {"default"} else kind
        if not isinstance(kind, dict) or kind.get("_type") not in KINDS:
            name = kind.get("_type") if isinstance(kind, dict) else kind
            raise refused(
                "quant_type", name, f"only {' and '.join(KINDS)} keep plain integers; save the model in one of them"
            )
        data = kind.get("_data")
        if not isinstance(data, dict):
            raise refused("quant_type", kind, "must say how")
        dtype, mapping = (
            _inner(data.get(name), default)
            for name, default in (("weight_dtype", "int8"), ("mapping_type", "SYMMETRIC"))
        )
        width = re.fullmatch(r"int(\d)", dtype)
        if width is None or int(width[1]) not in BITS:
            raise refused("quant_type.weight_dtype", dtype, f"only int of {BITS} bits is read")
        return cls(int(width[1]), not mapping.startswith("ASYMMETRIC"))

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        _n, k, groups = _facts(tensors)
        size = k // groups
        scale, zero = tensors["_weight_scale"], tensors.get("_weight_zero_point")
        check_scale("_weight_scale", scale)
        if scheme.symmetric and zero is not None and bool(zero.any()):
            raise FormatError("_weight_zero_point: not all are zero, as quant_type says")
        stored = None
        if not scheme.symmetric:
            assert zero is not None
            stored = spread(codes_of("_weight_zero_point", zero, scheme), k, size, scheme)
        packed = pack(codes_of("_weight_qdata", tensors["_weight_qdata"], scheme), scheme.bits)
        return settled(QuantizedTensor(packed, spread(scale, k, size, scheme), stored, scheme))

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        _n, k, groups = _facts(tensors)
        scale, zero = tensors["_weight_scale"], tensors.get("_weight_zero_point")
        check_scale("_weight_scale", scale)
        dense = tensors["_weight_qdata"].float()
        if zero is not None:
            dense -= zero.float().repeat_interleave(k // groups, 1)
        return dense * scale.float().repeat_interleave(k // groups, 1)

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda _module, tensors: self._layer(tensors))

    def _layer(self, tensors: Mapping[str, Any]) -> Layer:
        n, k, groups = _facts(tensors)
        if not self.symmetric:
            need(tensors, "_weight_zero_point", (torch.int8,), (n, groups))
        scheme = scheme_for(self.bits, -1 if groups == 1 else k // groups, k, self.symmetric)
        note = "" if scheme else f"groups of {k // groups} in rows of {k} do not divide into legal ones"
        return Layer((n, k), scheme, tensors["_weight_scale"].dtype, note)


def _inner(value: Any, default: str) -> str:
    """``"int4"`` from ``{"_type": ..., "_data": "int4"}``."""
    inner = value.get("_data") if isinstance(value, dict) else default
    return inner if isinstance(inner, str) else default


def _facts(tensors: Mapping[str, Any]) -> tuple[int, int, int]:
    """N, K and G."""
    n, k = need(tensors, "_weight_qdata", (torch.int8,), (None, None)).shape
    groups = need(tensors, "_weight_scale", FLOATS, (n, None)).shape[1]
    if k % groups:
        raise FormatError(f"_weight_scale has {groups} groups for {k} input features")
    if "_weight_zero_point" in tensors:
        need(tensors, "_weight_zero_point", (torch.int8,), (n, groups))
    return n, k, groups


FORMAT = TorchAO
