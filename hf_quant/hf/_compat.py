"""All differences between the versions of transformers that this package supports (5.10.1 and newer)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from hf_quant.hf._hooks import conversions_of, key_mapping, set_conversions
from hf_quant.hf.kv_cache import KINDS, QuantCache


def updated_conversions(update: Callable[..., list[Any]], conversions: list[Any], model: Any) -> list[Any]:
    """Call the base class's ``update_weight_conversions``: it takes the model since 5.21."""
    return update(conversions, model) if "model" in inspect.signature(update).parameters else update(conversions)


def arrivals(model: Any) -> Callable[[str], tuple[list[str], bool]]:
    """A function from the name of a tensor in a float checkpoint to its names in ``model``, and whether the loader does more than
    rename it; a converter may split one tensor into several."""
    mapping = get_model_conversion_mapping(model, dict(key_mapping()))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names = dict.fromkeys(model.state_dict(), True)

    def renamed(name: str) -> tuple[list[str], bool]:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, names)
        if target not in names and name in names:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, names)
        first, *others = of_pattern[pattern].target_patterns if pattern is not None else ("",)
        return [target, *(target.replace(first, other) for other in others)], pattern is not None

    return renamed


def renamer(model: Any) -> Callable[[str], tuple[str, bool]]:
    """As `arrivals`, with only the first name."""
    arriving = arrivals(model)

    def renamed(name: str) -> tuple[str, bool]:
        targets, converted = arriving(name)
        return targets[0], converted

    return renamed


def recompute_activations(model: Any) -> None:
    """Enable gradient checkpointing, whose method differs between versions."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def cache_argument(model: Any, kind: str | None = None) -> dict[str, Any]:
    """An empty cache of keys and values, as the keyword argument of ``model``: ``cache`` since 5.24.

    Args:
        model: The model that will be called with it.
        kind: ``"int8"`` or ``"int4"``; None for transformers' own cache in floating point.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: DynamicCache(config=model.config) if kind is None else QuantCache(model.config, KINDS[kind])}


def keep_for_saving(model: Any, converters: list[Any] | None) -> None:
    """Set the conversions that ``save_pretrained`` has to undo.

    It reverses the conversions used in loading. A load-only converter of this package would rename every weight on saving, and
    the converters of scales and zero points are missing after quantization on load, since the float checkpoint has none. So
    the renamings that were used are kept, with all converters of the model.
    """
    renamings = [c for c in conversions_of(model) if not hasattr(c, "operations")]
    model_converters = [c for c in converters or [] if hasattr(c, "operations")]
    for converter in model_converters:
        converter.operations = [_Merge(op.dim) if type(op) is MergeModulelist else op for op in converter.operations]
    set_conversions(model, renamings + model_converters)


class _Merge(MergeModulelist):
    """The inverse of `_Split`."""

    @property
    def reverse_op(self) -> ConversionOps:
        return _Split(self.dim)


class _Split(ConversionOps):
    """Split a stack into one tensor per expert; before 5.23, transformers' own also dropped every axis of size 1."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Tensor]:
        matrices: dict[str, Tensor] = {}
        for source, stack in input_dict.items():
            tensor = stack[0] if isinstance(stack, list) else stack
            name = target_patterns[0] if len(input_dict) == 1 else source  # after a chunk, the source is its target
            matrices |= {name.replace("*", str(i)): part for i, part in enumerate(tensor.unbind(self.dim))}
        return matrices

    @property
    def reverse_op(self) -> ConversionOps:
        return _Merge(self.dim)
