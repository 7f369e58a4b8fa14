"""FP8 checkpoints of DeepSeek, Qwen and MiniMax: E4M3 weights with one float32 scale for a block, read to floating point.

A block of 128 x 128 spans 18 binary orders of magnitude, which no integer grid of 8 bits holds; so the weights are multiplied out,
to the last bit as transformers does (``integrations/finegrained_fp8.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Called, Headers, Layer, Value, by_itself
from hf_quant.formats._common import FLOATS, ReadOnly, check_scale, each_layer, need, refused, times_blocks

FLOAT8 = (torch.float8_e4m3fn,)
SCALE = "weight_scale_inv"


@dataclass(frozen=True)
class FP8(ReadOnly):
    """weight float8 ``[N, K]``, weight_scale_inv ``[N / rows, K / columns]``, rounded up; activation_scale, which is not used.

    Args:
        block: Rows and columns that share a scale; None for one scale a matrix.
    """

    block: tuple[int, int] | None = (128, 128)

    label: ClassVar[str] = "fp8"
    methods: ClassVar[tuple[str, ...]] = ("fp8",)
    suffixes: ClassVar[tuple[str, ...]] = (SCALE, "activation_scale", "weight")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> FP8 | None:
        if config.get("quant_method") != "fp8":
            return None
        for field, only in (("scale_fmt", "float"), ("expert_dtype", "fp8")):
            if config.get(field, only) != only:
                raise refused(field, config[field], f"only {only} is read")
        block = config.get("weight_block_size", [128, 128])
        if block is None:
            return cls(None)
        if (
            not isinstance(block, list)
            or len(block) != 2
            or any(type(b) is not int or not 0 < b < 1 << 20 for b in block)
        ):
            raise refused("weight_block_size", block, "must be two sizes")
        return cls((block[0], block[1]))

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        raise FormatError("fp8: its weights are floating point")

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight, scale = tensors["weight"], tensors[SCALE]
        n, k = self._shape(tensors, (*FLOAT8, *FLOATS))  # transformers before 5.21 has cast them, which loses nothing
        check_scale(SCALE, scale)
        wide = weight.float()
        if not bool(wide.isfinite().all()):
            raise FormatError("weight: some values are NaN")
        rows, columns = self.block or (n, k)
        return times_blocks(wide, scale.reshape(-(-n // rows), -(-k // columns)), rows, columns)

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda _module, tensors: self._layer(tensors))

    def _layer(self, tensors: Mapping[str, Any]) -> Layer | None:
        if SCALE not in tensors and ("weight" not in tensors or tensors["weight"].dtype not in FLOAT8):
            return None
        return Layer(self._shape(tensors), None, tensors[SCALE].dtype, "8-bit floats")

    def _shape(self, tensors: Mapping[str, Any], dtypes: Sequence[torch.dtype] = FLOAT8) -> tuple[int, int]:
        n, k = need(tensors, "weight", dtypes, (None, None)).shape
        scale = need(tensors, SCALE, FLOATS)
        rows, columns = self.block or (n, k)
        expected = [-(-n // rows), -(-k // columns)]
        if list(scale.shape) != expected and not (self.block is None and list(scale.shape) in ([], [1])):
            raise FormatError(f"{SCALE} has shape {list(scale.shape)}, expected {expected}")
        return n, k


FORMAT = FP8
