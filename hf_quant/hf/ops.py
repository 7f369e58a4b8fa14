"""Conversions of float tensors between the checkpoint and the model, called by transformers while it loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from hf_quant.core.geometry import geometry_of
from hf_quant.core.layout import part_name
from hf_quant.core.scheme import QuantScheme
from hf_quant.disk.memory import give_back_memory
from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.hf._hooks import patterns_of
from hf_quant.hf.plan import Plan
from hf_quant.methods import quantize
from hf_quant.nn import QuantExperts
from hf_quant.nn._weight import frozen


class Quantizer(Protocol):
    """The part of the quantizer that the operations use."""

    failure: HfQuantError | None
    plan: Plan

    def param_needs_quantization(self, model: Any, param_name: str, **how: Any) -> bool:
        """Whether a parameter is quantized while it is loaded."""
        ...


class Apart(list[list[Tensor]]):
    """The matrices of a stack before stacking: for each source (gate, up), those of all experts."""


class KeepApart(ConversionOps):
    """Replaces the stacking and concatenation of float experts, which would hold a whole layer of them twice.

    Stacks that stay in floating point are made by the model's own operations.
    """

    def __init__(self, quantizer: Quantizer, operations: list[ConversionOps]) -> None:
        self.quantizer, self.operations = quantizer, operations

    def __deepcopy__(self, memo: dict[int, Any]) -> KeepApart:
        return self  # it holds no state, and transformers copies it for every tensor

    @classmethod
    def instead_of(cls, converter: Any, quantizer: Quantizer) -> Any:
        """The same converter with this operation, if its own operations only stack and concatenate."""
        operations = getattr(converter, "operations", [])
        merges = operations[:1] and type(operations[0]) is MergeModulelist and operations[0].dim == 0
        joins = not operations[1:] or (type(operations[1]) is Concatenate and operations[1].dim == 1)
        if not (merges and joins and len(operations) <= 2):
            return converter
        sources, targets = patterns_of(converter)
        if len(targets) != 1:
            return converter
        replacement = WeightConverter(sources, targets, [cls(quantizer, operations)])
        for scope in ("scope_prefix", "base_model_prefix"):  # for a model within a model
            if hasattr(converter, scope):
                setattr(replacement, scope, getattr(converter, scope))
        return replacement

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **how: Any,
    ) -> dict[str, Any]:
        if self.quantizer.param_needs_quantization(model, full_layer_name):
            return {target_patterns[0]: Apart(input_dict.values())}
        how |= {"target_patterns": target_patterns, "full_layer_name": full_layer_name, "model": model}
        for operation in self.operations:
            input_dict = operation.convert(input_dict, **how)
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("saving uses the model's own converters")


class QuantizeOnLoad(ConversionOps):
    """Quantizes a float weight; the experts of a stack are quantized one after the other."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:  # type: ignore[override]
        converted: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)  # so that this float tensor is freed before the next one is read
            converted |= self._one(name, value[0] if type(value) is list else value, model)
        give_back_memory()
        return converted

    def _one(self, name: str, value: Tensor | Apart, model: Any) -> dict[str, Tensor]:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        try:
            if self.quantizer.failure is not None:
                raise self.quantizer.failure
            parts = self._quantized(name, leaf, value, module)
        except HfQuantError as error:  # raised again after loading, since here transformers would only log it
            self.quantizer.failure = error
            return {name: frozen(torch.empty(0, dtype=torch.float32))}
        return {part_name(name, part): frozen(tensor) for part, tensor in parts.items()}

    def _quantized(self, name: str, leaf: str, value: Tensor | Apart, module: Any) -> dict[str, Tensor]:
        placeholder = getattr(module, leaf)
        if isinstance(module, QuantExperts):
            return self._stack(name, value, module, leaf, placeholder)
        assert isinstance(value, Tensor)
        _check_shape(name, value.shape, placeholder.shape)
        return self._matrix(name, geometry_of(module).matrix(value), module.scheme, placeholder.dtype)

    def _stack(
        self, name: str, value: Tensor | Apart, module: QuantExperts, leaf: str, placeholder: Tensor
    ) -> dict[str, Tensor]:
        stacked: dict[str, Tensor] = {}
        experts = placeholder.shape[0]
        count = len(value[0]) if isinstance(value, Apart) else value.shape[0]
        _check_shape(name, (count,), (experts,))
        for e in range(experts):
            weight = torch.cat([source[e] for source in value]) if isinstance(value, Apart) else value[e]
            _check_shape(f"{name}[{e}]", weight.shape, placeholder.shape[1:])
            matrix = geometry_of(module).matrix(weight)
            for local, part in self._matrix(f"{name}[{e}]", matrix, module.schemes[leaf], placeholder.dtype).items():
                if e == 0:
                    stacked[local] = part.new_empty((experts, *part.shape))
                stacked[local][e] = part
        return stacked

    def _matrix(self, name: str, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        if not math.isfinite(weight.sum().item()):
            bad = weight.numel() - int(weight.isfinite().sum())
            if bad:
                raise CheckpointError(f"tensor {name}: {bad} values are NaN or infinite")
        solver = self.quantizer.plan.decision.solver(scheme)
        return quantize(solver, weight, scheme, dtype).parts()

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("rounding cannot be undone")


def _check_shape(name: str, actual: Sequence[int], expected: Sequence[int]) -> None:
    if list(actual) != list(expected):
        raise CheckpointError(f"tensor {name} has shape {list(actual)}, config.json says {list(expected)}")
