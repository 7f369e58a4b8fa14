"""Formats: how a `QuantizedTensor` is laid out in a checkpoint. One file each.

Every format reads; some also write. A format made from a ``quantization_config`` (`format_of`) knows what that says of
the layout, and finds the quantized layers of a checkpoint in its headers (`Format.layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_quant import _plugins
from hf_quant.core.layout import Shaped
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized layer of a checkpoint, as the headers and the small tensors tell.

    Attributes:
        shape: ``(N, K)`` of its weight, or ``(E, N, K)`` of a stack of experts.
        scheme: How it is coded; None where it can only be read to floating point.
        scale_dtype: Of the stored scales.
        note: Why it is read to floating point, or what of it is left out.
    """

    shape: tuple[int, ...]
    scheme: QuantScheme | None
    scale_dtype: torch.dtype
    note: str = ""


Headers = Mapping[str, Mapping[str, Shaped]]  # module -> local name -> header
Value = Callable[[str], Tensor | None]  # the tensor of that full name, or None if it is too large to look at
Called = Callable[[str], Sequence[str]]  # the names by which a config may call the module of that name


def by_itself(module: str) -> Sequence[str]:
    """For checkpoints whose model is not known: a module has one name."""
    return (module,)


@runtime_checkable
class Format(Protocol):
    """Reads, and mostly writes, the tensors of one linear layer, under their local names.

    A format may also have these attributes of its class:

    * ``writes = False``: it only reads (`formats._common.ReadOnly`).
    * ``narrow_scales = True``: its readers hold scales in 16 bits.
    * ``to_write(schemes)``: the format that can hold these schemes, where there are several variants.
    * ``of_plan(default, overrides, left)``: the ``quantization_config`` of a model that is quantized with the scheme
      ``default`` but for the globs in ``overrides`` (glob to scheme) and ``left`` (in floating point). With it
      ``save_pretrained`` writes this format, too; None where that is `HfQuantConfig` as it is.
    """

    suffixes: ClassVar[tuple[str, ...]]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Format | None:
        """The format that a ``quantization_config`` asks for, or None if it speaks of another.

        Raises:
            FormatError: It is this one, but a field holds what cannot be read; the message names the field.
        """
        ...

    def why_not(self, scheme: QuantScheme) -> str | None:
        """Why this format cannot be written with ``scheme``, or None if it can."""
        ...

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Local name to (shape, dtype) of what `write` gives for a weight ``[N, K]`` with scales in ``dtype``."""
        ...

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Local name to tensor, for example ``{"weight_packed": ...}``; no copy where a view will do."""
        ...

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """Inverse of `write`; raises FormatError on a missing, misshapen or out-of-range tensor."""
        ...

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight ``[N, K]`` in float32, of a layer whose scheme is None; raises as `read` does."""
        ...

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        """The quantized layers among the modules that have tensors under one of the `suffixes`.

        Args:
            headers: All those modules.
            value: Reads small tensors; gives at least those of four kilobytes.
            called: Other names of a module: those in the file may differ from those that the config means.

        Raises:
            FormatError: Tensors are missing or contradict each other or the config; the message names the module.
        """
        ...

    def config(self, schemes: Mapping[str, QuantScheme], left: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of a checkpoint that was written in this format.

        Args:
            schemes: Of every quantized layer, by the name it has in the checkpoint.
            left: Names of the linear layers in floating point.

        Raises:
            FormatError: It cannot say that.
        """
        ...


def format_named(name: str) -> Format:
    """The format in the file of that name: ``format_named("native")``."""
    made: Format = _plugins.load("formats", name).FORMAT()
    return made


def can_save(name: str) -> bool:
    """Whether ``save_pretrained`` can write the format of that name."""
    return name in _plugins.names("formats") and hasattr(_plugins.load("formats", name).FORMAT, "of_plan")


def writable() -> list[str]:
    """Names of the formats that can be written."""
    return [n for n in _plugins.names("formats") if getattr(_plugins.load("formats", n).FORMAT, "writes", True)]


def format_to_write(name: str, schemes: Collection[QuantScheme]) -> Format:
    """The format of that name, in the variant that can hold these schemes."""
    loaded = _plugins.load("formats", name).FORMAT
    made: Format = loaded.to_write(schemes) if hasattr(loaded, "to_write") else loaded()
    return made


def format_of(config: Mapping[str, Any]) -> tuple[str, Format]:
    """Name of the format that a ``quantization_config`` speaks of, and that format.

    Raises:
        FormatError: No format reads it; or one would, but a field holds what it cannot read.
    """
    method = config.get("quant_method")
    for name in _plugins.names("formats"):
        found = _plugins.load("formats", name).FORMAT.of(config)
        if found is not None:
            return name, found
    raise FormatError(f"quantization_config.quant_method {ascii(method)[:80]}: no format reads it")
