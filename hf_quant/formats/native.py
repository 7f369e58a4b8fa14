"""This package's own layout: `QuantizedTensor` as it stands.

The codes are named ``weight`` and shaped unlike the float weight, so that transformers without this package refuses
the checkpoint for a shape mismatch; under a name of their own it would warn and run on random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import FormatError
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import Outliers, QuantizedTensor


class Native:
    """weight uint8 ``[N, K / 8 * bits]`` (8 bits: ``[N, K / 4, 4]``), weight_scale ``[N, G]``, weight_zero_point uint8 ``[N, G]``;
    of outliers weight_outlier_value ``[N, C]`` and weight_outlier_index int32 ``[C]`` (whole columns) or ``[N, C]``."""

    suffixes: ClassVar[tuple[str, ...]] = (
        "weight", "weight_scale", "weight_zero_point", "weight_outlier_index", "weight_outlier_value",
    )  # fmt: skip

    def why_not(self, scheme: QuantScheme) -> str | None:
        return None

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        groups, outliers = scheme.groups(k), scheme.outlier_count(k)
        codes = (n, k // 4, 4) if scheme.bits == 8 else (n, scheme.packed_bytes(k))
        made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": (codes, torch.uint8),
            "weight_scale": ((n, groups), dtype),
        }
        if not scheme.symmetric:
            made["weight_zero_point"] = ((n, groups), torch.uint8)
        if outliers:
            made["weight_outlier_index"] = ((outliers,) if scheme.outlier_columns else (n, outliers), torch.int32)
            made["weight_outlier_value"] = ((n, outliers), dtype)
        return made

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        codes = tensor.qweight.unflatten(-1, (-1, 4)) if tensor.scheme.bits == 8 else tensor.qweight
        made = {"weight": codes, "weight_scale": tensor.scale}
        if tensor.zero_point is not None:
            made["weight_zero_point"] = tensor.zero_point
        if tensor.outliers is not None:
            made |= {"weight_outlier_index": tensor.outliers.index, "weight_outlier_value": tensor.outliers.value}
        return made

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        absent = {"weight_zero_point"} if scheme.symmetric else set()
        absent |= set() if scheme.outliers else {"weight_outlier_index", "weight_outlier_value"}
        wanted = [name for name in self.suffixes if name not in absent]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise FormatError(f"native: no {missing}")
        codes = tensors["weight"]
        zero = None if scheme.symmetric else tensors["weight_zero_point"]
        if zero is not None and int(zero.max()) > scheme.qmax:
            raise FormatError(f"native: weight_zero_point {int(zero.max())} is over {scheme.qmax}")
        qweight = codes.flatten(-2) if scheme.bits == 8 else codes
        made = QuantizedTensor(qweight, tensors["weight_scale"], zero, scheme)
        return replace(made, outliers=self._outliers(tensors, made.in_features)) if scheme.outliers else made

    def _outliers(self, tensors: Mapping[str, Tensor], columns: int) -> Outliers:
        index, value = tensors["weight_outlier_index"], tensors["weight_outlier_value"]
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < columns:
            raise FormatError(f"native: weight_outlier_index reaches outside of {columns} columns")
        return Outliers(index, value)


FORMAT = Native
