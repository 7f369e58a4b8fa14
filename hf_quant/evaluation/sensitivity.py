"""The cost of quantizing one group of layers while all others stay in floating point.

Layers that a kernel or format fuses share one scheme: query, key and value; gate and up; all experts of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.geometry import Geometry, geometry_of
from hf_quant.core.numerics import quantize_rows
from hf_quant.core.scheme import QuantScheme
from hf_quant.hf._hooks import replaced
from hf_quant.methods import Method, quantize
from hf_quant.nn._hooks import GATE
from hf_quant.solve.block import parameter_in

FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q", "k", "v", "query", "key", "value"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3", "wi_0", "wi_1"), "gate_up"),
}


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers that must share a scheme: name of the group to the names of its layers, in order."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if parent.rpartition(".")[2] == "experts":
            grouped.setdefault(parent, []).append(name)
        else:
            grouped.setdefault(f"{parent}.{FUSED.get(leaf, leaf)}" if leaf in FUSED else name, []).append(name)
    return grouped


@contextmanager
def rounded(model: Any, names: Sequence[str], scheme: QuantScheme, method: Method) -> Iterator[None]:
    """Inside, the weights ``names`` of a floating-point ``model``, and their inputs if ``scheme`` says so, are rounded."""
    before = {name: parameter_in(model, name) for name in names}
    originals = {name: weight.data for name, (weight, _) in before.items()}
    with ExitStack() as rounding:
        try:
            for weight, geometry in before.values():
                weight.data = _round(weight.data, geometry, scheme, method)
            if scheme.activations:
                for enter in _inputs(model, names):
                    rounding.enter_context(enter)
            yield
        finally:
            for name, (weight, _) in before.items():
                weight.data = originals[name]


def _inputs(model: Any, names: Sequence[str]) -> list[AbstractContextManager[None]]:
    """Contexts that round the inputs of the weights ``names`` to INT8, one for each input tensor."""
    contexts: dict[tuple[int, bool], AbstractContextManager[None]] = {}
    for name in names:
        owner, second = _owner(model, name), _is_second_stack(model, name)
        if (id(owner), second) not in contexts:  # two stacks may share an input, which is rounded once
            contexts[id(owner), second] = _second_rounded(owner) if second else _input_rounded(owner)
    return list(contexts.values())


@contextmanager
def _input_rounded(layer: torch.nn.Module) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(_round_input)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _second_rounded(experts: Any) -> Iterator[None]:
    """Rounds the input of the second stack of an experts layer: the output of the gate, or of the activation without a gate."""
    if not getattr(experts, "has_gate", True):
        handle = experts.act_fn.register_forward_hook(lambda _module, _args, output: _rounded_rows(output))
        try:
            yield
        finally:
            handle.remove()
        return
    gate = getattr(experts, GATE)
    with replaced(experts, GATE, lambda y: _rounded_rows(gate(y))):
        yield


def _is_second_stack(model: Any, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    stacked = isinstance(getattr(model.get_submodule(parent), leaf), torch.nn.Parameter)
    return stacked and leaf == "down_proj"


def sensitivities(
    model: Any, layers: Mapping[str, Sequence[str]], schemes: Sequence[QuantScheme], method: Method,
    cost: Callable[[Any], float], progress: Callable[[Any], Any] = iter,
) -> dict[str, list[float]]:  # fmt: skip
    """The cost of each group alone, under each scheme.

    Args:
        model: In floating point; unchanged afterwards.
        layers: From `groups`.
        schemes: To try.
        method: Chooses codes without calibration data.
        cost: Measures the model.
        progress: Wraps the list of trials.
    """
    costs: dict[str, list[float]] = {name: [] for name in layers}
    for group, scheme in progress([(group, scheme) for group in layers for scheme in schemes]):
        with rounded(model, layers[group], scheme, method):
            costs[group].append(cost(model))
    return costs


def _owner(model: Any, name: str) -> torch.nn.Module:
    """The module that multiplies by the weight ``name``."""
    parent, _, leaf = name.rpartition(".")
    module: torch.nn.Module = model.get_submodule(parent)
    return module if isinstance(getattr(module, leaf), torch.nn.Parameter) else getattr(module, leaf)


def _round_input(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    geometry = geometry_of(module)
    return (geometry.with_rows(args[0], _rounded_rows(geometry.rows(args[0]))), *args[1:])


def _rounded_rows(x: Tensor) -> Tensor:
    codes, scale = quantize_rows(x)
    return (codes * scale).to(x.dtype)


@torch.inference_mode()
def _round(weight: Tensor, geometry: Geometry, scheme: QuantScheme, method: Method) -> Tensor:
    matrices = geometry.matrix(weight)
    parts = []
    for rows in matrices if matrices.dim() == 3 else matrices[None]:
        codes = quantize(method, rows.contiguous(), scheme.fitted(rows.shape[1]), torch.bfloat16)
        parts.append(codes.dequantize(weight.dtype))
    return geometry.weight(torch.stack(parts).view(matrices.shape)).contiguous()
