"""MXFP4 experts of gpt-oss: stacks of 4-bit floats (E2M1) with a power of two for 32 weights; all other layers are floating point.

As transformers reads them (``integrations/mxfp4.py``). A stack in the file is ``[E, N, K]``; gpt-oss holds its transpose in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.formats import Called, Headers, Layer, Value, by_itself
from hf_quant.formats._common import ReadOnly, each_layer, need
from hf_quant.formats._fp4 import MX, powers_of_two

BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class MXFP4(ReadOnly):
    """STACK_blocks uint8 ``[E, N, K / 32, 16]``, two codes in a byte, the first in its low bits; STACK_scales uint8 ``[E, N, K / 32]``."""

    label: ClassVar[str] = "mxfp4"
    methods: ClassVar[tuple[str, ...]] = ("mxfp4",)
    suffixes: ClassVar[tuple[str, ...]] = ()
    stack_endings: ClassVar[tuple[str, ...]] = (BLOCKS, SCALES)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> MXFP4 | None:
        return cls() if config.get("quant_method") == "mxfp4" else None

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        _layer(tensors)
        scale = powers_of_two(SCALES, tensors[SCALES])
        return QuantizedTensor(tensors[BLOCKS].flatten(-2).contiguous(), scale, None, scheme)

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda _module, tensors: _layer(tensors))


def _layer(tensors: Mapping[str, Any]) -> Layer:
    e, n, groups, _ = need(tensors, BLOCKS, (torch.uint8,), (None, None, None, MX // 2)).shape
    need(tensors, SCALES, (torch.uint8,), (e, n, groups))
    return Layer((e, n, groups * MX), QuantScheme(4, MX, codebook="e2m1"), torch.bfloat16)


FORMAT = MXFP4
