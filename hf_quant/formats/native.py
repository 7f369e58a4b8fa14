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
    """weight uint8 ``[N, K / 8 * bits]`` (8 bits: ``[N, K / 4, 4]``), weight_scale ``[N, G]``, weight_zero_point uint8 ``[N, G]``.

    Real zero points have the dtype of the scale; of permuted columns weight_perm int32 ``[1, K]`` says which is where.
    """

    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "weight_zero_point", "weight_perm")

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
            made["weight_zero_point"] = ((n, groups), dtype if scheme.real_zero else torch.uint8)
        if scheme.permuted:
            made["weight_perm"] = ((1, k), torch.int32)
        return made

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        codes = tensor.qweight.unflatten(-1, (-1, 4)) if tensor.scheme.bits == 8 else tensor.qweight
        made = {"weight": codes, "weight_scale": tensor.scale}
        if tensor.zero_point is not None:
            made["weight_zero_point"] = tensor.zero_point
        if tensor.perm is not None:
            made["weight_perm"] = tensor.perm
        return made

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        wanted = ["weight", "weight_scale"]
        wanted += [] if scheme.symmetric else ["weight_zero_point"]
        wanted += ["weight_perm"] if scheme.permuted else []
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise FormatError(f"native: no {missing}")
        codes = tensors["weight"]
        zero = None if scheme.symmetric else tensors["weight_zero_point"]
        if zero is not None and not scheme.real_zero and int(zero.max()) > scheme.qmax:
            raise FormatError(f"native: weight_zero_point {int(zero.max())} is over {scheme.qmax}")
        flat = codes.flatten(-2) if scheme.bits == 8 else codes
        return QuantizedTensor(flat, tensors["weight_scale"], zero, scheme, tensors.get("weight_perm"))


FORMAT = Native
