"""This package's own layout: `QuantizedTensor` as it stands.

The codes are named ``weight`` and shaped unlike the float weight, so that transformers without this package refuses
the checkpoint for a shape mismatch; under a name of their own it would warn and run on random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import FormatError
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import QuantizedTensor


class Native:
    """weight uint8 ``[N, K / 8 * bits]`` (8 bits: ``[N, K / 4, 4]``), weight_scale ``[N, G]``, weight_zero_point uint8 ``[N, G]``."""

    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "weight_zero_point")

    def why_not(self, scheme: QuantScheme) -> str | None:
        return None

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        groups = scheme.groups(k)
        codes = (n, k // 4, 4) if scheme.bits == 8 else (n, scheme.packed_bytes(k))
        made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": (codes, torch.uint8),
            "weight_scale": ((n, groups), dtype),
        }
        if not scheme.symmetric:
            made["weight_zero_point"] = ((n, groups), torch.uint8)
        return made

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        codes = tensor.qweight.unflatten(-1, (-1, 4)) if tensor.scheme.bits == 8 else tensor.qweight
        made = {"weight": codes, "weight_scale": tensor.scale}
        if tensor.zero_point is not None:
            made["weight_zero_point"] = tensor.zero_point
        return made

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        wanted = self.suffixes[:2] if scheme.symmetric else self.suffixes
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise FormatError(f"native: no {missing}")
        codes = tensors["weight"]
        zero = None if scheme.symmetric else tensors["weight_zero_point"]
        if zero is not None and int(zero.max()) > scheme.qmax:
            raise FormatError(f"native: weight_zero_point {int(zero.max())} is over {scheme.qmax}")
        return QuantizedTensor(codes.flatten(-2) if scheme.bits == 8 else codes, tensors["weight_scale"], zero, scheme)


FORMAT = Native
