"""Replaces float modules of a model by quantized ones, and the reverse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quant.core.geometry import CONVOLUTIONS, TRANSPOSED, patches_of, weight_of
from hf_quant.core.layout import COMPANIONS, WEIGHT, part_name
from hf_quant.core.scheme import QuantScheme
from hf_quant.hf.candidates import Candidate
from hf_quant.hf.plan import Plan
from hf_quant.nn import QuantEmbedding, QuantExperts, QuantLinear, QuantMatrix, QuantPatches, as_quant_experts
from hf_quant.nn._hooks import mark_initialized
from hf_quant.nn.experts import stacks


@dataclass(frozen=True)
class Modules:
    """Builds the quantized modules of a plan.

    Attributes:
        plan: Modules and stacks with their schemes.
        scale_dtypes: Layer to the dtype of its scales in the checkpoint, if there is one.
    """

    plan: Plan
    scale_dtypes: Mapping[str, torch.dtype]

    def put_in_place(self, model: Any, by_name: Mapping[str, Candidate], *, quantized: bool) -> None:
        """Replace every module of the plan by a quantized one with empty parameters.

        Args:
            model: In floating point.
            by_name: Its candidates.
            quantized: Whether the parameters will be codes; if not, they are placeholders that loading quantizes.
        """
        for name in self.plan.schemes:
            if by_name[name].kind != "experts":
                self._replace(model, name, quantized)
        for name in dict.fromkeys(n.rpartition(".")[0] for n in self.plan.schemes if by_name[n].kind == "experts"):
            self._replace_experts(model, name, quantized)
        if self.plan.tied:
            self._tie_companions(model)

    def place(self, model: Any, layer: str, parts: Mapping[str, nn.Parameter]) -> None:
        """Store the codes of a layer, or of a stack of experts, in a float model.

        Args:
            model: Its module is replaced if it is still in floating point.
            layer: Name of the module, or full name of the stack.
            parts: As in `core.layout`.
        """
        path, _, leaf = layer.rpartition(".")
        module = model.get_submodule(path)
        if leaf in stacks(module) or isinstance(module, QuantExperts):
            if not isinstance(module, QuantExperts):
                self._replace_experts(model, path, quantized=True)
            codes = leaf
        else:
            bias = module.get_submodule(leaf).bias
            self._replace(model, layer, quantized=True)
            module, codes = model.get_submodule(layer), WEIGHT
            module.bias = bias
        for part, tensor in parts.items():
            mark_initialized(tensor)
            module.register_parameter(part_name(codes, part), tensor)

    def _replace(self, model: Any, name: str, quantized: bool) -> None:
        old, scheme = model.get_submodule(name), self.plan.schemes[name]
        new: nn.Module
        with torch.device("meta"):
            if isinstance(old, nn.Embedding):
                new = QuantEmbedding(
                    old.num_embeddings, old.embedding_dim, scheme,
                    padding_idx=old.padding_idx, dtype=old.weight.dtype, quantized=quantized,
                )  # fmt: skip
            else:
                new = _quantized(old, scheme, quantized, self._scale_dtype(name, old.weight.dtype))
        new.train(old.training)
        model.set_submodule(name, new)

    def _replace_experts(self, model: Any, name: str, quantized: bool) -> None:
        """Quantize all stacks of an experts layer; its own class is a base of the new one."""
        stack_schemes: dict[str, QuantScheme] = {
            full.removeprefix(f"{name}."): scheme
            for full, scheme in self.plan.schemes.items()
            if full.startswith(f"{name}.")
        }
        finer = {stack: self._scale_dtype(f"{name}.{stack}", model.dtype) for stack in stack_schemes}
        with torch.device("meta"):
            as_quant_experts(
                model.get_submodule(name), stack_schemes, quantized=quantized,
                scale_dtypes={stack: dtype for stack, dtype in finer.items() if dtype is not None},
            )  # fmt: skip

    def _scale_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype | None:
        """The dtype of a layer's scales in the checkpoint, if ``dtype`` cannot represent all their values."""
        stored = self.scale_dtypes.get(name)
        return stored if stored is not None and torch.promote_types(stored, dtype) != dtype else None

    def _tie_companions(self, model: Any) -> None:
        ties = model.all_tied_weights_keys
        for target, source in list(ties.items()):
            if not target.endswith(".weight"):
                continue  # a bias
            name = target.removesuffix(".weight")
            head = model.get_submodule(name)
            if isinstance(head, QuantLinear) and name in self.plan.schemes:
                head.shares_codes = True
                for companion in COMPANIONS:
                    if getattr(head, f"{WEIGHT}{companion}", None) is not None:
                        ties[target + companion] = source + companion


def to_float(model: Any, dtype: torch.dtype | None) -> None:
    """Replace every quantized module by the float module that it replaced; its parameters are ordinary ones, which can be trained.

    Args:
        model: Quantized, with all codes in memory.
        dtype: The dtype of weights; None for that of each layer's scales.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantExperts):
            module._unpack()
            for stack in list(module.schemes):
                dense = module.expert_weight(stack, dtype)
                for companion in COMPANIONS:
                    module._parameters.pop(stack + companion, None)
                module._parameters[stack] = nn.Parameter(dense)  # in its place: PEFT counts on the order
            module.__class__ = module.float_class  # type: ignore[assignment]
        elif isinstance(module, (QuantMatrix, QuantEmbedding)):
            model.set_submodule(name, _float_module(module, dtype))


def _quantized(old: Any, scheme: QuantScheme, quantized: bool, scale_dtype: torch.dtype | None) -> nn.Module:
    """The quantized layer, with empty parameters, in place of a linear layer or a convolution in floating point."""
    n, k = weight_of(old).shape
    rest: dict[str, Any] = {
        "bias": old.bias is not None, "dtype": old.weight.dtype, "quantized": quantized, "scale_dtype": scale_dtype
    }  # fmt: skip
    if (patches := patches_of(old)) is not None:
        return QuantPatches(patches, n, scheme, **rest)
    return QuantLinear(k, n, scheme, conv1d=not isinstance(old, nn.Linear), **rest)


def _float_module(module: QuantMatrix | QuantEmbedding, dtype: torch.dtype | None) -> nn.Module:
    weight = module.dequantize(dtype)
    n, k = weight.shape
    if isinstance(module, QuantEmbedding):
        return nn.Embedding(n, k, module.padding_idx, _weight=weight)
    with torch.device("meta"):
        dense = _dense(module)
    dense.weight = nn.Parameter(module.geometry.weight(weight).contiguous())
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.to(weight.dtype))
    return dense


def _dense(module: QuantMatrix) -> nn.Module:
    n, k, bias = module.out_features, module.in_features, module.bias is not None
    if isinstance(module, QuantPatches):
        patches = module.geometry
        kind: Any = CONVOLUTIONS[len(patches.kernel) - 1]
        convolution: nn.Module = kind(patches.channels, n, patches.kernel, patches.stride, bias=bias)
        return convolution
    conv1d: Any = Conv1D  # its __init__ is not annotated
    dense: nn.Module = conv1d(n, k) if module.geometry is TRANSPOSED else nn.Linear(k, n, bias=bias)
    return dense
