"""This package's own layout: `QuantizedTensor` as it stands.

The codes are named ``weight`` and shaped unlike the float weight, so that transformers without this package refuses
the checkpoint for a shape mismatch; under a name of their own it would warn and run on random weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.packing import pack_short, unpack_short
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import Outliers, QuantizedTensor, index_dtype
from hf_quant.errors import FormatError, SchemeError
from hf_quant.formats import Called, Headers, Layer, Shaped, Value, by_itself
from hf_quant.formats._common import FLOATS, Globs, is_sequence, need, refused, short


@dataclass(frozen=True)
class Native:
    """weight uint8 ``[N, K / 8 * bits]`` (8 bits: ``[N, K / 4, 4]``), weight_scale ``[N, G]``.

    weight_zero_point uint8 ``[N, ceil(G * bits / 8)]`` is packed like codes; real zero points are ``[N, G]`` in the dtype of
    the scale. Of permuted columns weight_perm int32 ``[1, K]`` says which is where. Of outliers weight_outlier_value
    ``[N, C]`` and weight_outlier_index ``[C]`` (whole columns) or ``[N, C]``, of `tensor.index_dtype`.
    A static scale of the inputs is weight_input_scale ``[1]``.

    Args:
        schemes: Name or glob of modules to scheme, the first match counts; the last one, ``*``, is the default.
    """

    schemes: tuple[tuple[str, QuantScheme], ...] = ()

    suffixes: ClassVar[tuple[str, ...]] = (
        "weight", "weight_scale", "weight_zero_point", "weight_perm", "weight_outlier_index", "weight_outlier_value",
        "weight_input_scale",
    )  # fmt: skip

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Native | None:
        if config.get("quant_method") != "hf_quant":
            return None
        overrides = config.get("overrides") or {}
        if not isinstance(overrides, Mapping):
            raise refused("overrides", overrides, "must be an object")
        if not is_sequence(config.get("modules_to_not_convert") or []):
            raise refused("modules_to_not_convert", config["modules_to_not_convert"], "must be a list of names")
        try:
            made = [(name, QuantScheme.parse(slug)) for name, slug in overrides.items() if slug is not None]
            return cls((*made, ("*", _default(config))))
        except SchemeError as error:
            raise FormatError(f"quantization_config: {error}") from None

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
        if scheme.activations == "tensor":
            made["weight_input_scale"] = ((1,), dtype)
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
        if tensor.input_scale is not None:
            made["weight_input_scale"] = tensor.input_scale
        return made

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        self.check(tensors, scheme)
        codes, scale = tensors["weight"], tensors["weight_scale"]
        zero = tensors.get("weight_zero_point")
        if zero is not None and not scheme.real_zero:
            zero = unpack_short(zero, scheme.bits, scale.shape[-1])
        outliers = None
        if scheme.outliers:
            outliers = Outliers(tensors["weight_outlier_index"], tensors["weight_outlier_value"])
        return QuantizedTensor(
            codes.flatten(-2) if scheme.bits == 8 else codes, scale, zero, scheme, tensors.get("weight_perm"),
            outliers, tensors.get("weight_input_scale"),
        )  # fmt: skip

    def check(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> None:
        """Check one layer, or a stack of experts, before a kernel meets it; any codes are good ones.

        Args:
            tensors: By local name.
            scheme: Of the layer.

        Raises:
            FormatError: A tensor is missing, misshapen, or holds what it must not; the message names it.
        """
        wrong = _misfit(tensors, scheme) or wrong_values(tensors, scheme, in_features(tensors["weight"], scheme))
        if wrong is not None:
            raise FormatError(wrong)

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        raise FormatError("native: the scheme of the layer is unknown")

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        made = {}
        for module, own in headers.items():
            if own["weight"].dtype in FLOATS if "weight" in own else False:
                continue  # a layer in floating point
            try:
                made[module] = self._layer(called(module), own)
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

    def _layer(self, names: Sequence[str], own: Mapping[str, Any]) -> Layer:
        weight, scale = need(own, "weight", (torch.uint8,)), need(own, "weight_scale", FLOATS)
        named = self._named.first(names)
        scheme = self.schemes[-1][1] if named is None else self.schemes[named][1]
        if (
            wrong := _misfit(own, scheme)
        ) is not None:  # perhaps the config knows it by a name that only a model tells
            fitting = [other for other in dict.fromkeys(dict(self.schemes).values()) if _misfit(own, other) is None]
            if len(fitting) != 1:
                raise FormatError(wrong)
            scheme = fitting[0]
        *lead, n, _groups = scale.shape
        return Layer((*lead, n, in_features(weight, scheme)), scheme, scale.dtype)

    @cached_property
    def _named(self) -> Globs:
        return Globs("overrides", [name for name, _ in self.schemes[:-1]])


def _default(config: Mapping[str, Any]) -> QuantScheme:
    slug = config.get("scheme")
    if slug is not None:
        return QuantScheme.parse(slug)
    return QuantScheme(config.get("bits", 4), config.get("group_size", 128), config.get("symmetric", True))


def in_features(weight: Shaped, scheme: QuantScheme) -> int:
    """K of a layer, which the width of its codes tells."""
    stored: int = weight.shape[-2] * weight.shape[-1] if scheme.bits == 8 else weight.shape[-1]
    return stored * 8 // scheme.bits


def _misfit(own: Mapping[str, Shaped], scheme: QuantScheme) -> str | None:
    """Which tensor has not the shape or type that the scheme asks for; None if all have."""
    if missing := next((name for name in ("weight", "weight_scale") if name not in own), None):
        return f"{missing} is missing"
    weight, scale = own["weight"], own["weight_scale"]
    if len(scale.shape) < 2 or len(weight.shape) != len(scale.shape) + (scheme.bits == 8):
        return f"weight has shape {list(weight.shape)} and weight_scale {list(scale.shape)}: not those of {scheme}"
    *lead, n, _groups = scale.shape
    k = in_features(weight, scheme)
    if not n or not k:
        return f"weight has shape {list(weight.shape)}: it is empty"
    try:
        scheme.fitted(k)  # refuses rows that fill no words
        layout = Native().layout((n, k), scheme, scale.dtype)
    except SchemeError as error:
        return f"weight has shape {list(weight.shape)}: {error}"
    for name in (*layout, *own):
        if (name in layout) != (name in own):
            return f"{name} is {'missing' if name in layout else 'not part'} of {scheme}"
        shape, dtype = layout[name]
        wanted = [[*lead, *shape]] + ([[*lead, 2, k]] if lead and name == "weight_perm" else [])  # of gate and up
        if list(own[name].shape) not in wanted:
            return f"{name} has shape {list(own[name].shape)}, expected {wanted[0]} for {[n, k]} in {scheme}"
        if own[name].dtype is not dtype:
            return f"{name} has dtype {short(own[name].dtype)}, expected {short(dtype)} for {scheme}"
    return None


def wrong_values(tensors: Mapping[str, Tensor], scheme: QuantScheme, columns: int) -> str | None:
    """What a kernel must not meet among the numbers beside the codes; None if all is well.

    Args:
        tensors: By local name; the codes need not be there.
        scheme: Of the layer.
        columns: Its input features.
    """
    scale = tensors["weight_scale"]
    # of other programs' codes only: blocks of zeros have a scale of zero there; AutoRound makes negative ones
    good = scale.isfinite() if scheme.foreign else scale.isfinite() & (scale != 0)
    if not bool(good.all()):
        return f"weight_scale: {int((~good).sum())} scales are zero or not finite numbers"
    largest = 1 if scheme.codebook else scheme.zero if scheme.symmetric else scheme.qmax
    if (
        not scheme.real_zero
        and scale.numel()
        and float(scale.abs().max()) * largest > 2 * torch.finfo(scale.dtype).max
    ):
        return f"weight_scale: weights of {float(scale.abs().max()):g} times {largest} are too large for {short(scale.dtype)}"
    for name in ("weight_zero_point", "weight_outlier_value"):
        if name in tensors and tensors[name].is_floating_point() and not bool(tensors[name].isfinite().all()):
            return f"{name}: some are not finite numbers"
    ranges = tensors.get("weight_input_scale")
    if ranges is not None and not bool((ranges.isfinite() & (ranges > 0)).all()):
        return "weight_input_scale: must be a finite number above zero"
    perm, index = tensors.get("weight_perm"), tensors.get("weight_outlier_index")
    if perm is not None and not bool((perm.sort(-1).values == torch.arange(columns, device=perm.device)).all()):
        return f"weight_perm: not an order of {columns} columns"
    return None if index is None or not index.numel() else _wrong_index(index, columns)


def _wrong_index(index: Tensor, columns: int) -> str | None:
    """A kernel reads activations at these places, and writes zeros over them."""
    least, most = int(index.min()), int(index.max())
    if least < 0 or most >= columns:
        return f"weight_outlier_index reaches from {least} to {most}, outside of {columns} columns"
    if bool((index.diff() <= 0).any()):
        return "weight_outlier_index: the columns of a row must ascend, each standing once"
    return None


FORMAT = Native
