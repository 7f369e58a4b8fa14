"""This package's own format: the parts of a `QuantizedTensor` as a module holds them (`core.layout`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.layout import PARTS, in_features, shapes_of, wrong_shape, wrong_values
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError, SchemeError
from hf_quant.formats import Called, Headers, Layer, Traits, Value, by_itself
from hf_quant.formats._common import FLOATS, Globs, each_layer, is_sequence, need, refused


@dataclass(frozen=True)
class Native(Traits):
    """Reads and writes the parts that `core.layout` describes.

    Args:
        schemes: Name or glob of modules to scheme, the first match counts; the last one, ``*``, is the default.
        convolutions: Names of the modules that are convolutions.
    """

    schemes: tuple[tuple[str, QuantScheme], ...] = ()
    convolutions: frozenset[str] = frozenset()

    label: ClassVar[str] = "native"
    methods: ClassVar[tuple[str, ...]] = ("hf_quant",)
    in_memory: ClassVar[bool] = True
    saved: ClassVar[bool] = True
    converted_to: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = PARTS

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Native | None:
        if config.get("quant_method") != "hf_quant":
            return None
        overrides = config.get("overrides") or {}
        if not isinstance(overrides, Mapping):
            raise refused("overrides", overrides, "must be an object")
        _names(config, "modules_to_not_convert")
        try:
            schemes = [(name, QuantScheme.parse(slug)) for name, slug in overrides.items() if slug is not None]
            return cls((*schemes, ("*", _default(config))), frozenset(_names(config, "convolutions")))
        except SchemeError as error:
            raise FormatError(f"quantization_config: {error}") from None

    def description(self, schemes: Iterable[QuantScheme]) -> str:
        return f"`{self.label}` of hf-quant"

    def elsewhere(self, schemes: Iterable[QuantScheme]) -> str:
        return (
            "Without hf-quant, transformers refuses it with a shape mismatch. `model.dequantize()` gives the "
            "floating-point model back."
        )

    def why_not(self, scheme: QuantScheme) -> str | None:
        return None

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return shapes_of(shape, scheme, dtype)

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        return tensor.parts()

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        self.check(tensors, scheme)
        return QuantizedTensor.from_parts(tensors, scheme)

    def check(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> None:
        """Check one layer, or a stack of experts, before a kernel meets it; any codes are good ones.

        Args:
            tensors: By local name.
            scheme: Of the layer.

        Raises:
            FormatError: A tensor is missing, misshapen, or holds what it must not; the message names it.
        """
        wrong = wrong_shape(tensors, scheme) or wrong_values(tensors, scheme, in_features(tensors["weight"], scheme))
        if wrong is not None:
            raise FormatError(wrong)

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        raise FormatError("native: the scheme of the layer is unknown")

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(
            headers, lambda module, tensors: self._layer(called(module), tensors) if _is_coded(tensors) else None
        )

    def config(self, schemes: Mapping[str, QuantScheme], left: Sequence[str]) -> dict[str, Any]:
        default = Counter(schemes.values()).most_common(1)[0][0]
        return {
            "quant_method": "hf_quant", "version": 1, "format": self.label, "scheme": str(default),
            "overrides": {name: str(scheme) for name, scheme in schemes.items() if scheme != default},
            "modules_to_not_convert": list(left),
        }  # fmt: skip

    def _layer(self, names: Sequence[str], tensors: Mapping[str, Any]) -> Layer:
        weight, scale = need(tensors, "weight", (torch.uint8,)), need(tensors, "weight_scale", FLOATS)
        named = self._named.first(names)
        scheme = self.schemes[-1][1] if named is None else self.schemes[named][1]
        if (
            wrong := wrong_shape(tensors, scheme)
        ) is not None:  # perhaps the config knows it by a name that only a model tells
            fitting = [
                other for other in dict.fromkeys(dict(self.schemes).values()) if wrong_shape(tensors, other) is None
            ]
            if len(fitting) != 1:
                raise FormatError(wrong)
            scheme = fitting[0]
        *lead, n, _groups = scale.shape
        convolution = not self.convolutions.isdisjoint(names)
        return Layer((*lead, n, in_features(weight, scheme)), scheme, scale.dtype, convolution=convolution)

    @cached_property
    def _named(self) -> Globs:
        return Globs("overrides", [name for name, _ in self.schemes[:-1]])


def _names(config: Mapping[str, Any], field: str) -> Sequence[str]:
    names: Sequence[str] = config.get(field) or []
    if not is_sequence(names) or not all(isinstance(name, str) for name in names):
        raise refused(field, names, "must be a list of names")
    return names


def _default(config: Mapping[str, Any]) -> QuantScheme:
    slug = config.get("scheme")
    if slug is not None:
        return QuantScheme.parse(slug)
    return QuantScheme(config.get("bits", 4), config.get("group_size", 128), config.get("symmetric", True))


def _is_coded(tensors: Mapping[str, Any]) -> bool:
    dense = "weight" in tensors and tensors["weight"].dtype in FLOATS
    if dense and "weight_scale" in tensors:
        raise FormatError("weight is in floating point, and scales of codes stand beside it")
    return not dense


FORMAT = Native
