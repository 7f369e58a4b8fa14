"""The tensors of a float checkpoint by the names of the model's parameters.

transformers renames, stacks and concatenates tensors while it loads. Here the same conversions are applied to one parameter at
a time, so that a block can be read alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.hf._hooks import computed
from hf_quant.solve.block import inside

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass
class Tensors:
    """The parameters of a model, read from its checkpoint.

    Attributes:
        checkpoint: The checkpoint.
        model: The model; may be on the meta device.
    """

    checkpoint: Checkpoint
    model: Any
    _sources: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)  # parameter: tensors, patterns
    _converters: dict[str, Any] = field(default_factory=dict)
    _tied: dict[str, str] = field(
        default_factory=dict
    )  # parameter to the one of the same value that the checkpoint has

    def __post_init__(self) -> None:
        self._parameters = {n for n, _ in self.model.named_parameters()}
        transforms = get_model_conversion_mapping(self.model)
        for name in sorted(self.checkpoint.tensors, key=_naturally):  # expert 10 after expert 9
            target, converter, pattern = _renamed(name, transforms, self._parameters, self.model.base_model_prefix)
            first, *others = converter.target_patterns if converter is not None else ("",)
            for parameter in (target, *(target.replace(first, other) for other in others)):
                self._sources.setdefault(parameter, []).append((name, pattern))
                if converter is not None:
                    self._converters[parameter] = converter

        for target, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            for one, other in ((target, source), (source, target)):  # a file holds either of them, or both
                if one not in self._sources and other in self._sources:
                    self._tied[one] = other

    def read(self, name: str) -> Tensor:
        """A parameter of the model; one that checkpoints need not have is computed as the model does, like sinusoids.

        Raises:
            HfQuantError: The checkpoint has no tensors for it.
        """
        name = self._tied.get(name, name)
        sources = self._sources.get(name)
        if sources is None:
            if (value := computed(self.model, name)) is not None:
                return value
            raise HfQuantError(f"the checkpoint has no tensor for {name}")
        converter = self._converters.get(name)
        if converter is None:
            return self.checkpoint.read(sources[0][0])
        converted: dict[str, Any] = {}
        for tensor, pattern in sources:
            converted.setdefault(str(pattern), []).append(self.checkpoint.read(tensor))
        first, *others = converter.target_patterns
        whole = next(
            (name.replace(other, first) for other in others if other in name), name
        )  # as transformers calls it
        for operation in converter.operations:
            converted = operation.convert(
                converted, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns,
                full_layer_name=whole, model=self.model, config=self.model.config, missing_keys=None,
            )  # fmt: skip
        value = next(value for target, value in converted.items() if target in name)
        return value[0] if isinstance(value, list) else value

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of the model under its own name: not one that is computed, or tied to another."""
        return name in self._sources

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a parameter.

        Raises:
            CheckpointError: It is stored as 8-bit floats or integers, which have no meaning without their scales.
        """
        source = self._sources[self._tied.get(name, name)][0][0]
        info = self.checkpoint.tensors[source]
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{info.file.name}: tensor {source} has dtype {info.dtype}: only models in floating point of 16 bits and "
                "more can be quantized"
            )
        return DTYPES[info.dtype]

    def unused(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors under ``prefix`` that are not parameters, which are mostly buffers."""
        for target, sources in self._sources.items():
            if target.startswith(prefix) and target not in self._parameters:
                yield target, self.checkpoint.read(sources[0][0])

    def outside(self, blocks: Mapping[str, Any], coded: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """All tensors outside of the blocks that are not ``coded``; those that are converted keep their names in the checkpoint."""
        for target, sources in self._sources.items():
            if target not in coded and not any(target.startswith(inside(block)) for block in blocks):
                for name, pattern in sources:
                    yield target if pattern is None else name, self.checkpoint.read(name)


def _naturally(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _renamed(name: str, transforms: list[Any], parameters: set[str], prefix: str) -> tuple[str, Any, str | None]:
    """The parameter that a tensor belongs to, its converter, and the pattern of that.

    A name that only becomes unknown by its conversion keeps it, as in transformers.
    """
    target, converter, pattern = _converted(name, transforms)
    renamed = _with_prefix(target, parameters, prefix)
    if renamed not in parameters and name in parameters:
        return name, None, None
    return renamed, converter, pattern


def _converted(name: str, transforms: list[Any]) -> tuple[str, Any, str | None]:
    for transform in transforms:
        if not hasattr(transform, "operations"):
            name, _ = transform.rename_source_key(name)
    for transform in transforms:
        if hasattr(transform, "operations"):
            renamed, pattern = transform.rename_source_key(name)
            if pattern is not None:
                return renamed, transform, pattern
    return name, None, None


def _with_prefix(name: str, parameters: set[str], prefix: str) -> str:
    """The name with or without the prefix of the base model, whichever the model has."""
    if name in parameters:
        return name
    candidates = (f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in parameters), name)
