"""Formats: how a `QuantizedTensor` is laid out in a checkpoint. One file each.

Every format reads; some also write. A format made from a ``quantization_config`` (`format_of`) knows what that says of
the layout, and finds the quantized layers of a checkpoint in its headers (`Format.layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
        convolution: Whether it is a convolution, whose weight is a matrix here too; only in formats that are `in_memory`.
    """

    shape: tuple[int, ...]
    scheme: QuantScheme | None
    scale_dtype: torch.dtype
    note: str = ""
    convolution: bool = False


Headers = Mapping[str, Mapping[str, Shaped]]  # module -> local name -> header
Value = Callable[[str], Tensor | None]  # the tensor of that full name, or None if it is too large to look at
Called = Callable[[str], Sequence[str]]  # the names by which a config may call the module of that name


def by_itself(module: str) -> Sequence[str]:
    """For checkpoints whose model is not known: a module has one name."""
    return (module,)


class Traits(Protocol):
    """What the rest of the package asks of a format besides the tensors of one layer; a format overrides what differs.

    Attributes:
        label: What users call it.
        in_memory: Whether its tensors are the parameters of a model, as `core.layout` describes them. Such a format also holds
            embeddings and stacks of experts, and names layers as the model does.
        saved: Whether ``save_pretrained`` writes it.
        automatic: Whether it is preferred where the user leaves the choice open.
        converted_to: Whether ``hf-quant convert`` writes it.
        stack_endings: What the names of the tensors of a stack of experts end in, after the name of the stack, where its programs
            store whole stacks ``[E, N, K]``; local names are these.
        kinds: Kinds of modules (`hf.candidates.Kind`) that its programs expect to be quantized, where it is not `in_memory`.
        scales_16bit: Whether its readers need scales of 16 bits.
        methods: Values of ``quant_method`` in config.json by which its checkpoints are recognized.
        variant_fields: Fields of a ``quantization_config`` that tell its variants apart; the first that is there counts.
        config_file: Name of a file beside the weights where its programs write the ``quantization_config``.
        marker_file: Name of a file that says, by being there, that the checkpoint has this format.
        also_in: Fields of config.json where its programs look for the ``quantization_config`` besides.
        vllm: Whether vLLM reads it.
        vllm_int8: Whether vLLM reads its layers with INT8 activations.
    """

    label: ClassVar[str]
    in_memory: ClassVar[bool] = False
    saved: ClassVar[bool] = False
    automatic: ClassVar[bool] = False
    converted_to: ClassVar[bool] = False
    stack_endings: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    scales_16bit: ClassVar[bool] = False
    methods: ClassVar[tuple[str, ...]] = ()
    variant_fields: ClassVar[tuple[str, ...]] = ("format",)
    config_file: ClassVar[str | None] = None
    marker_file: ClassVar[str | None] = None
    also_in: ClassVar[tuple[str, ...]] = ()
    vllm: ClassVar[bool] = False
    vllm_int8: ClassVar[bool] = False

    @classmethod
    def writer(cls, schemes: Iterable[QuantScheme]) -> Format:
        """The variant of the format that is written for layers of these schemes."""
        fmt: Format = cls()  # type: ignore[assignment]
        return fmt

    def of_columns(self, columns: int) -> Format:
        """The format for layers of that many input features, where their tensors alone do not tell how they are coded."""
        return self  # type: ignore[return-value]

    def config_of_plan(
        self, default: QuantScheme, overrides: Mapping[str, QuantScheme], ignore: Sequence[str]
    ) -> dict[str, Any]:
        """The ``quantization_config`` of a model that ``save_pretrained`` writes; only where `saved` and not `in_memory`.

        Args:
            default: Scheme of every linear layer not named below.
            overrides: Module name, or glob of ``*`` and ``?``, to scheme.
            ignore: Names or globs of the linear layers left in floating point.

        Raises:
            FormatError: The format cannot express a glob.
        """
        raise FormatError(f"{self.label}: save_pretrained does not write it")

    def int8_activations(self, config: Mapping[str, Any], scheme: QuantScheme) -> QuantScheme:
        """``scheme`` with activations as the program that wrote ``config`` rounds them.

        Raises:
            FormatError: It rounds them in a way that is not known here.
        """
        return scheme

    def description(self, schemes: Iterable[QuantScheme]) -> str:
        """What a model card calls the format of weights in ``schemes``; Markdown."""
        return f"`{self.label}`"

    def elsewhere(self, schemes: Iterable[QuantScheme]) -> str:
        """A sentence for the model card on what programs other than hf-quant do with it; empty if none was tried."""
        return ""

    def vllm_refusal(self, scheme: QuantScheme, *, marlin: bool) -> str | None:
        """Why vLLM refuses this format with ``scheme``, in a way that it would not refuse others; ``marlin``: whether Marlin has the group size."""
        return None

    def vllm_kernel(self, scheme: QuantScheme, *, marlin: bool) -> str | None:
        """The kernel that vLLM has for this format alone; None where all formats share its kernels."""
        return None


@runtime_checkable
class Format(Traits, Protocol):
    """Reads, and mostly writes, the tensors of one linear layer, under their local names."""

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
    loaded_format: Format = _plugins.load("formats", name).FORMAT()
    return loaded_format


def format_of(config: Mapping[str, Any]) -> tuple[str, Format]:
    """Name of the format that a ``quantization_config`` speaks of, and that format.

    Raises:
        FormatError: No format reads it; or one would, but a field holds what it cannot read.
    """
    method = config.get("quant_method")
    for name in _plugins.names("formats"):
        fmt = _plugins.load("formats", name).FORMAT.of(config)
        if fmt is not None:
            return name, fmt
    raise FormatError(f"quantization_config.quant_method {ascii(method)[:80]}: no format reads it")


def formats() -> Mapping[str, Format]:
    """Name to every format there is."""
    return _formats(tuple(_plugins.names("formats")))


@lru_cache
def _formats(names: tuple[str, ...]) -> Mapping[str, Format]:
    return {name: format_named(name) for name in names}


def in_memory_format() -> str:
    """Name of the format that stores a model as it is in memory, and so holds every plan."""
    return next(name for name, fmt in formats().items() if fmt.in_memory)


def saved_formats() -> list[str]:
    """Names of the formats that ``save_pretrained`` writes, the one that holds every plan first."""
    return sorted((name for name, fmt in formats().items() if fmt.saved), key=lambda name: name != in_memory_format())


def conversion_targets() -> dict[str, str]:
    """Label to name of the formats that ``hf-quant convert`` writes."""
    return {fmt.label: name for name, fmt in formats().items() if fmt.converted_to}


def label_of(name: str) -> str:
    """What users call a format; the name itself of one that is not here."""
    fmt = formats().get(name)
    return name if fmt is None else fmt.label


def known_methods() -> list[str]:
    """Values of ``quant_method`` by which checkpoints of other programs are recognized."""
    return sorted({method for fmt in formats().values() if not fmt.in_memory for method in fmt.methods})
