"""BitNet b1.58: weights of -1, 0 and 1 with one scale a matrix, and INT8 activations by row (arXiv:2402.17764).

Read as 2-bit codes around 2. Four quarters of the rows lie in the bits of one byte, as transformers packs them
(``integrations/bitnet.py``). Of its two kinds of layers, BitLinear divides by the scale and AutoBitLinear multiplies by it.
"""

from __future__ import annotations

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
from hf_quant.formats._common import FLOATS, ReadOnly, check_scale, each_layer, need, refused, scheme_for


@dataclass(frozen=True)
class BitNet(ReadOnly):
    """weight uint8 ``[N / 4, K]``, weight_scale ``[1]``.

    Args:
        divides: Whether a layer divides by its scale.
    """

    divides: bool = True

    label: ClassVar[str] = "bitnet"
    methods: ClassVar[tuple[str, ...]] = ("bitnet",)
    suffixes: ClassVar[tuple[str, ...]] = ("weight_scale", "weight")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> BitNet | None:
        if config.get("quant_method") != "bitnet":
            return None
        kind = config.get("linear_class", "bitlinear")
        if kind not in ("bitlinear", "autobitlinear"):
            raise refused("linear_class", kind, "must be bitlinear or autobitlinear")
        if config.get("quantization_mode", "offline") != "offline":
            raise refused(
                "quantization_mode",
                config["quantization_mode"],
                "weights that are rounded at run time are floating point",
            )
        if config.get("use_rms_norm", False) is not False:
            raise refused("use_rms_norm", config["use_rms_norm"], "a norm inside of linear layers is not read")
        return cls(kind == "bitlinear")

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        n, _ = _shape(tensors)
        codes = self._codes(tensors)
        scale = self._scale(tensors).view(1, 1).expand(n, 1).contiguous()
        return QuantizedTensor(pack(codes + 1, scheme.bits), scale, None, scheme)

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        _shape(tensors)
        return (self._codes(tensors).float() - 1) * self._scale(tensors)

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda _module, tensors: _layer(tensors))

    def _scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scale = tensors["weight_scale"].float()
        check_scale("weight_scale", scale)
        return 1 / scale if self.divides else scale

    def _codes(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """0, 1 and 2 for -1, 0 and 1: uint8 ``[N, K]``."""
        packed = tensors["weight"]
        codes = torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])
        if bool((codes == 3).any()):
            raise FormatError("weight: 3 is none of the three codes of a ternary weight")
        return codes


def _layer(tensors: Mapping[str, Any]) -> Layer | None:
    if "weight_scale" not in tensors and ("weight" not in tensors or tensors["weight"].dtype is not torch.uint8):
        return None
    n, k = _shape(tensors)
    scheme = scheme_for(2, -1, k, True, activations="token")
    return Layer((n, k), scheme, torch.float32, "" if scheme else f"{k} input features are not a multiple of 32")


def _shape(tensors: Mapping[str, Any]) -> tuple[int, int]:
    quarter, k = need(tensors, "weight", (torch.uint8,), (None, None)).shape
    scale = need(tensors, "weight_scale", FLOATS)
    if list(scale.shape) not in ([1], []):
        raise FormatError(f"weight_scale has shape {list(scale.shape)}, expected one value")
    return 4 * quarter, k


FORMAT = BitNet
