"""This package's own layout: `QuantizedTensor` as it stands.

The codes are named ``weight`` and shaped unlike the float weight, so that transformers without this package refuses
the checkpoint for a shape mismatch; under a name of their own it would warn and run on random weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.errors import FormatError, SchemeError
from hf_quant.formats import Headers, Layer, Value
from hf_quant.formats._common import FLOATS, check_scale, is_sequence, need, refused
from hf_quant.packing import pack_short, unpack_short
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import Outliers, QuantizedTensor, index_dtype


@dataclass(frozen=True)
class Native:
    """weight uint8 ``[N, K / 8 * bits]`` (8 bits: ``[N, K / 4, 4]``), weight_scale ``[N, G]``.

    weight_zero_point uint8 ``[N, ceil(G * bits / 8)]`` is packed like codes; real zero points are ``[N, G]`` in the dtype of
    the scale. Of permuted columns weight_perm int32 ``[1, K]`` says which is where. Of outliers weight_outlier_value
    ``[N, C]`` and weight_outlier_index ``[C]`` (whole columns) or ``[N, C]``, of `tensor.index_dtype`.

    Args:
        schemes: Name or glob of modules to scheme, the first match counts; the last one, ``*``, is the default.
    """

    schemes: tuple[tuple[str, QuantScheme], ...] = ()

    suffixes: ClassVar[tuple[str, ...]] = (
        "weight", "weight_scale", "weight_zero_point", "weight_perm", "weight_outlier_index", "weight_outlier_value",
    )  # fmt: skip

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Native | None:
        if config.get("quant_method") != "hf_quant":
            return None
        overrides = config.get("overrides") or {}
        if not isinstance(overrides, Mapping):
            raise refused("overrides", overrides, "must be an object")
        named = [*overrides.items(), ("*", config.get("scheme"))]
        try:
            made = tuple((name, QuantScheme.parse(slug)) for name, slug in named if slug is not None)
        except SchemeError as error:
            raise FormatError(f"quantization_config: {error}") from None
        if not is_sequence(config.get("modules_to_not_convert") or []):
            raise refused("modules_to_not_convert", config["modules_to_not_convert"], "must be a list of names")
        return cls(made)

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
            packed = ((n, scheme.zero_bytes(k)), torch.uint8)
            made["weight_zero_point"] = ((n, groups), dtype) if scheme.real_zero else packed
        if scheme.permuted:
            made["weight_perm"] = ((1, k), torch.int32)
        if outliers:
            made["weight_outlier_index"] = ((outliers,) if scheme.outlier_columns else (n, outliers), index_dtype(k))
            made["weight_outlier_value"] = ((n, outliers), dtype)
        return made

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        codes = tensor.qweight.unflatten(-1, (-1, 4)) if tensor.scheme.bits == 8 else tensor.qweight
        made = {"weight": codes, "weight_scale": tensor.scale}
        if tensor.zero_point is not None:
            real = tensor.scheme.real_zero
            made["weight_zero_point"] = (
                tensor.zero_point if real else pack_short(tensor.zero_point, tensor.scheme.bits)
            )
        if tensor.perm is not None:
            made["weight_perm"] = tensor.perm
        if tensor.outliers is not None:
            made |= {"weight_outlier_index": tensor.outliers.index, "weight_outlier_value": tensor.outliers.value}
        return made

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        absent = {"weight_zero_point"} if scheme.symmetric else set()
        absent |= set() if scheme.permuted else {"weight_perm"}
        absent |= set() if scheme.outliers else {"weight_outlier_index", "weight_outlier_value"}
        wanted = [name for name in self.suffixes if name not in absent]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise FormatError(f"native: no {missing}")
        codes = tensors["weight"]
        check_scale("weight_scale", tensors["weight_scale"])
        zero = None if scheme.symmetric else tensors["weight_zero_point"]
        if zero is not None and scheme.real_zero and not bool(zero.isfinite().all()):
            raise FormatError("native: weight_zero_point: some are not finite numbers")
        if zero is not None and not scheme.real_zero:
            zero = unpack_short(zero, scheme.bits, tensors["weight_scale"].shape[-1])
        perm = tensors.get("weight_perm")
        if perm is not None and not bool(
            (perm.sort(-1).values == torch.arange(perm.shape[-1], device=perm.device)).all()
        ):
            raise FormatError(f"native: weight_perm is not an order of {perm.shape[-1]} columns")
        flat = codes.flatten(-2) if scheme.bits == 8 else codes
        made = QuantizedTensor(flat, tensors["weight_scale"], zero, scheme, perm)
        return replace(made, outliers=self._outliers(tensors, made.in_features)) if scheme.outliers else made

    def _outliers(self, tensors: Mapping[str, Tensor], columns: int) -> Outliers:
        index, value = tensors["weight_outlier_index"], tensors["weight_outlier_value"]
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < columns:
            raise FormatError(f"native: weight_outlier_index reaches outside of {columns} columns")
        return Outliers(index, value)

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        raise FormatError("native: the scheme of the layer is unknown")

    def layers(self, headers: Headers, value: Value) -> dict[str, Layer]:
        made = {}
        for module, own in headers.items():
            if own["weight"].dtype in FLOATS if "weight" in own else False:
                continue  # a layer in floating point
            try:
                made[module] = self._layer(module, own)
            except FormatError as error:
                raise FormatError(f"{module}: {error}") from None
        return made

    def config(self, schemes: Mapping[str, QuantScheme], left: Sequence[str]) -> dict[str, Any]:
        default = Counter(schemes.values()).most_common(1)[0][0]
        return {
            "quant_method": "hf_quant", "version": 1, "format": "native", "scheme": str(default),
            "overrides": {name: str(scheme) for name, scheme in schemes.items() if scheme != default},
            "modules_to_not_convert": list(left),
        }  # fmt: skip

    def _layer(self, module: str, own: Mapping[str, Any]) -> Layer:
        weight, scale = need(own, "weight", (torch.uint8,)), need(own, "weight_scale", FLOATS)
        named = next((scheme for glob, scheme in self.schemes[:-1] if fnmatchcase(module, glob)), None)
        if named is None and ".experts." not in module:
            named = self.schemes[-1][1]
        # experts stand apart in the file, but the config calls them by the name of their stack
        fitting = dict.fromkeys(s for s in ([named] if named else dict(self.schemes).values()) if _fits(own, s))
        if len(fitting) != 1:
            raise FormatError(f"weight has shape {list(weight.shape)}, weight_scale {list(scale.shape)}: they fit "
                              f"{'several schemes' if fitting else 'no scheme'} of the config")  # fmt: skip
        scheme = next(iter(fitting))
        *lead, n, _groups = scale.shape
        return Layer((*lead, n, _in_features(weight, scheme)), scheme, scale.dtype)


def _in_features(weight: Any, scheme: QuantScheme) -> int:
    stored: int = weight.shape[-2] * weight.shape[-1] if scheme.bits == 8 else weight.shape[-1]
    return stored * 8 // scheme.bits


def _fits(own: Mapping[str, Any], scheme: QuantScheme) -> bool:
    """Whether the shapes and types of the tensors are those of the scheme."""
    if len(own["weight"].shape) < 2:
        return False
    *lead, n, _groups = own["weight_scale"].shape
    try:
        layout = Native().layout((n, _in_features(own["weight"], scheme)), scheme, own["weight_scale"].dtype)
    except SchemeError:
        return False
    if lead and "weight_perm" in layout:
        layout["weight_perm"] = (tuple(own["weight_perm"].shape[1:]) if "weight_perm" in own else (), torch.int32)
    return set(layout) == set(own) and all(
        list(own[name].shape) == [*lead, *shape] and own[name].dtype == dtype
        for name, (shape, dtype) in layout.items()
    )


FORMAT = Native
