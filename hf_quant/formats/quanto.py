"""optimum-quanto checkpoints of 8-bit integers with one scale a row.

They are marked by ``quanto_qmap.json`` and not by config.json, so only `hf_quant.load` and the commands know them. With 4 and 2
bits, quanto subtracts a real number after scaling (``q * scale - shift``), which zero points cannot represent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Called, Headers, Layer, Value, by_itself
from hf_quant.formats._common import FLOATS, ReadOnly, check_scale, each_layer, need, scheme_for, settled


class Quanto(ReadOnly):
    """weight._data int8 ``[N, K]``, weight._scale ``[N, 1]``; scales of activations, which stay in floating point."""

    label: ClassVar[str] = "quanto"
    marker_file: ClassVar[str | None] = "quanto_qmap.json"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight._data._data", "weight._data", "weight._scale", "weight._shift", "input_scale", "output_scale",
    )  # fmt: skip

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Quanto | None:
        return cls() if config.get("quant_method") == "quanto" else None

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        _facts(tensors)
        check_scale("weight._scale", tensors["weight._scale"])
        codes = tensors["weight._data"].contiguous().view(torch.uint8) ^ 0x80  # -128..127 to 0..255
        return settled(QuantizedTensor(codes, tensors["weight._scale"].contiguous(), None, scheme))

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        _facts(tensors)
        check_scale("weight._scale", tensors["weight._scale"])
        return tensors["weight._data"].float() * tensors["weight._scale"].float()

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda _module, tensors: _layer(tensors))


def _layer(tensors: Mapping[str, Any]) -> Layer | None:
    if not any(local.startswith("weight.") for local in tensors):
        return None
    n, k = _facts(tensors)
    scheme = scheme_for(8, -1, k, True)
    note = "" if scheme else f"{k} input features are not a multiple of 32"
    return Layer((n, k), scheme, tensors["weight._scale"].dtype, note)


def _facts(tensors: Mapping[str, Any]) -> tuple[int, int]:
    if "weight._shift" in tensors:
        raise FormatError(
            "weight._shift is subtracted after scaling, which codes with zero points cannot hold: quantize the original "
            "model again, or load this one with optimum-quanto"
        )
    if "weight._data" in tensors and tensors["weight._data"].dtype is not torch.int8:
        raise FormatError(
            f"weight._data has dtype {tensors['weight._data'].dtype}: of optimum-quanto only 8-bit integers are read; "
            "load this one with optimum-quanto"
        )
    n, k = need(tensors, "weight._data", (torch.int8,), (None, None)).shape
    need(tensors, "weight._scale", FLOATS, (n, 1))
    return n, k


FORMAT = Quanto
