"""Conversions of quantized tensors between the checkpoint and the model, called by transformers while it loads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.pytorch_utils import Conv1D

from hf_quant.core.coded_scales import CodedScales
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.formats import Format
from hf_quant.hf._hooks import patterns_of
from hf_quant.hf.community import PIECES
from hf_quant.nn import QuantExperts, QuantLinear
from hf_quant.nn._weight import frozen


def conversions(quantizer: Any, fmt: Format, of_model: list[Any]) -> list[Any]:
    """The conversions in order: ours for stacks, the model's own, and ours for layers."""
    stacks, last = [], []
    if fmt.suffixes:
        pieces = [WeightConverter([f"experts.*.{piece}.weight" for piece, of in PIECES.items() if of == stack], f"experts.{stack}",
                                  [MergeModulelist()]) for stack in dict.fromkeys(PIECES.values())]  # fmt: skip
        stacks = [stack for c in [*of_model, *pieces] if (stack := _for_stack(quantizer, fmt, c)) is not None]
        # a pattern may match anywhere in a name, and in older versions need not match to its end: hence the dot and the dollar
        patterns = [_pattern("", local) for local in _longest_first(fmt)]
        last.append(WeightConverter(patterns, ".weight", [ReadLayer(quantizer, fmt)]))
    if fmt.stack_endings:
        last.append(WeightConverter([f"{ending}$" for ending in fmt.stack_endings], "", [ReadWhole(quantizer, fmt)]))
    return [*stacks, *of_model, *last]


def _for_stack(quantizer: Any, fmt: Format, converter: Any) -> Any:
    operations = getattr(converter, "operations", [])
    merges = operations[:1] and type(operations[0]) is MergeModulelist and operations[0].dim == 0
    joins = not operations[1:] or (type(operations[1]) is Concatenate and operations[1].dim == 1)
    if not (merges and joins and len(operations) <= 2):
        return None
    sources, targets = patterns_of(converter)
    bases = [source.removesuffix("$").removesuffix(".weight").removesuffix("\\") for source in sources]
    if len(targets) != 1 or not all(source.removesuffix("$").endswith(".weight") for source in sources):
        return None
    patterns = {_pattern(base, local): (i, local) for local in _longest_first(fmt) for i, base in enumerate(bases)}
    return WeightConverter(list(patterns), targets, [ReadStack(quantizer, fmt, patterns)])


def _longest_first(fmt: Format) -> list[str]:
    return sorted(fmt.suffixes, key=len, reverse=True)


def _pattern(base: str, local: str) -> str:
    return rf"{base}\.{re.escape(local)}$"


class _Read(ConversionOps):
    """Has the attribute ``hf_quantizer``, by which transformers knows to pass tensors in their own dtype."""

    def __init__(self, quantizer: Any, fmt: Format) -> None:
        self.hf_quantizer, self.fmt = quantizer, fmt

    def __deepcopy__(self, memo: dict[int, Any]) -> _Read:
        return self  # it holds no state, and transformers copies it for every tensor

    def _guarded(self, name: str, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The result of ``read``; if that fails, nothing, and the error is raised again after loading.

        Here transformers would only log it, and raise an error that names no tensor.
        """
        try:
            return {} if self.hf_quantizer.failure is not None else read()
        except HfQuantError as error:
            home = name.removesuffix(".weight")
            self.hf_quantizer.failure = CheckpointError(f"{self.hf_quantizer.placed.files.get(home, home)}: {error}")
            return {}

    def _dense(self, tensors: Mapping[str, Tensor], scheme: QuantScheme | None, module: Any, leaf: str) -> Tensor:
        """The weight in float32 for a parameter of a module, of a layer that has ``scheme`` in the file."""
        if scheme is not None:
            return self.fmt.read(tensors, scheme).dequantize(torch.float32)
        turned = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
        return self.fmt.of_columns(getattr(module, leaf).shape[-2 if turned else -1]).dense(tensors)

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("saving writes a format of this package")


class ReadLayer(_Read):
    """The tensors of a layer become those of a `QuantLinear`, bit for bit, or its dequantized weight."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Tensor]:
        tensors = {_local(pattern): v[0] if isinstance(v, list) else v for pattern, v in input_dict.items()}
        return self._guarded(full_layer_name, lambda: self._read(model, full_layer_name, tensors))

    def _read(self, model: Any, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        path, _sep, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantLinear):
            return parameters_of(name, self.fmt.read(tensors, module.scheme), module.weight_scale.dtype)
        placed = self.hf_quantizer.placed
        plain = path not in placed.dense  # a float weight may have scales of activations beside it
        dense = tensors["weight"] if plain else self._dense(tensors, placed.coded.get(path), module, leaf)
        dense = dense.to(getattr(module, leaf).dtype)
        return {name: nn.Parameter(dense, requires_grad=plain)}


class ReadWhole(_Read):
    """The tensors of a stack become its codes, or its dequantized weights in the layout of the model."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Tensor]:
        tensors = {pattern[:-1]: v[0] if isinstance(v, list) else v for pattern, v in input_dict.items()}
        return self._guarded(full_layer_name, lambda: self._read(model, full_layer_name, tensors))

    def _read(self, model: Any, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        path, _sep, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantExperts) and leaf in module.schemes:
            scales = getattr(module, f"{leaf}_scale").dtype
            return parameters_of(name, self.fmt.read(tensors, module.schemes[leaf]), scales)
        dense = self._dense(tensors, self.hf_quantizer.placed.coded.get(name), module, leaf)
        dense = dense.to(getattr(module, leaf).dtype)
        return {name: frozen(dense.mT.contiguous() if getattr(module, "is_transposed", False) else dense)}


class ReadStack(_Read):
    """The tensors of all experts become a stack of codes, or of dequantized weights."""

    def __init__(self, quantizer: Any, fmt: Format, patterns: Mapping[str, tuple[int, str]]) -> None:
        super().__init__(quantizer, fmt)
        self.patterns = patterns  # pattern -> (number of the source, local name)

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Tensor]:
        parts: list[dict[str, list[Tensor]]] = [{} for _ in range(1 + max(i for i, _ in self.patterns.values()))]
        for pattern, tensors in input_dict.items():
            i, local = self.patterns[pattern]
            parts[i][local] = tensors
        return self._guarded(full_layer_name, lambda: self._read(model, full_layer_name, parts))

    def _read(self, model: Any, name: str, parts: list[dict[str, list[Tensor]]]) -> dict[str, Tensor]:
        path, _sep, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        scheme = module.schemes.get(leaf) if isinstance(module, QuantExperts) else None
        experts = getattr(module, leaf).shape[0]
        stacked: dict[str, Tensor] = {}
        for expert in range(experts):
            of_expert = [{local: tensors[expert] for local, tensors in part.items()} for part in parts]
            if scheme is None:
                one = {name: torch.cat([self._float(piece, module, leaf) for piece in of_expert])}
            else:
                one = _joined([self.fmt.read(piece, scheme) for piece in of_expert]).parts(name)
            for full, tensor in one.items():
                if full not in stacked:
                    stacked[full] = tensor.new_empty((experts, *tensor.shape), dtype=model.get_parameter(full).dtype)
                stacked[full][expert] = tensor
        return {full: frozen(tensor) for full, tensor in stacked.items()}

    def _float(self, tensors: dict[str, Tensor], module: Any, leaf: str) -> Tensor:
        return (
            tensors["weight"]
            if list(tensors) == ["weight"] and tensors["weight"].dtype.itemsize > 1
            else self._dense(tensors, None, module, leaf)
        )


def _local(pattern: str) -> str:
    """The local name that `_pattern` was made from, for a layer."""
    return pattern[2:-1].replace("\\", "")


def _joined(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """One matrix with the rows of several, which keep the order of their columns."""
    if len(parts) == 1:
        return parts[0]
    zero, perm = (
        None if first is None else torch.cat([getattr(part, name) for part in parts])
        for name, first in (("zero_point", parts[0].zero_point), ("perm", parts[0].perm))
    )
    ranges = [part.input_scale for part in parts if part.input_scale is not None]  # of the same input
    return QuantizedTensor(
        torch.cat([part.qweight for part in parts]),
        torch.cat([part.scale for part in parts]),
        zero,
        parts[0].scheme,
        perm,
        input_scale=torch.stack(ranges).amax(0) if ranges else None,
        coded=CodedScales.joined(coded, torch.cat)
        if (coded := [p.coded for p in parts if p.coded is not None])
        else None,
    )


def parameters_of(name: str, read: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of a layer in the model: ``name`` and its companions, in `core.layout`.

    Args:
        name: Full name of the parameter that holds the codes.
        read: The layer.
        scale_dtype: The dtype of scales and related parts in the model.
    """
    zero = (
        read.zero_point.to(scale_dtype) if read.scheme.real_zero and read.zero_point is not None else read.zero_point
    )
    if read.coded is not None:
        return {part: frozen(tensor) for part, tensor in read.parts(name).items()}
    inputs = None if read.input_scale is None else read.input_scale.to(scale_dtype)
    typed = replace(read, scale=read.scale.to(scale_dtype), zero_point=zero, input_scale=inputs)
    return {part: frozen(tensor) for part, tensor in typed.parts(name).items()}
