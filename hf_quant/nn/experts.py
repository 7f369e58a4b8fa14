"""Mixture-of-experts layers whose experts are stacked 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.kernels import LinearSpec, back_in_order, by_expert, outlier_linear, select
from hf_quant.nn._hooks import apply_gate, has_gate_function, mark_initialized
from hf_quant.nn._outside import Outside, seen
from hf_quant.nn._repacking import Repacking
from hf_quant.nn._weight import frozen, read, register

STACKED = ("gate_up_proj", "up_proj", "down_proj")  # names of the stacks in transformers, as far as a layer has them
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class QuantExperts(Repacking):
    """Mixed into a model's experts class, whose gate, activation and flags it uses.

    Every stack ``[E, N, K]`` becomes codes ``[E, N, K / 8 * bits]`` with ``_scale`` and other companions; transposed stacks
    ``[E, K, N]`` (gpt-oss) are transposed when they are quantized.

    If a kernel can multiply whole stacks (`kernels.LinearBackend`), `choose_kernel` repacks them for it, and tokens are sorted by
    expert on the device; otherwise one expert is multiplied after the other.
    """

    schemes: dict[str, QuantScheme]
    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles: this class is created at run time and cannot be imported by its name."""
        return _blank, (self.float_class,), self.__getstate__()

    def choose_kernel(self) -> None:
        self._unpack()
        if any(getattr(self, f"{name}_scale").device.type == "meta" for name in self.schemes):
            return
        self._specs = {name: self._stored(name) for name in self.schemes}
        backends = [select(spec, repacking=not self.keeps_layout) for spec in self._specs.values()]
        self._backend = backends[0]
        coded = {_first(self), "down_proj"} <= self.schemes.keys()
        ordered = not any(
            scheme.permuted for scheme in self.schemes.values()
        )  # else every expert permutes x differently
        if coded and ordered and len(set(map(type, backends))) == 1 and hasattr(self._backend, "experts"):
            for name in self.schemes:
                self._repack(name)

    def _schemes(self) -> Mapping[str, QuantScheme]:
        return self.schemes

    def float_shape(self, name: str) -> tuple[int, ...] | None:
        scheme = self.schemes.get(name)
        if scheme is None:
            return None
        experts, n = getattr(self, f"{name}_scale").shape[:2]
        k = (self._specs[name] if self._emptied(name) else self._stored(name)).in_features
        return (experts, k, n) if self.is_transposed else (experts, n, k)

    def float_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.expert_weight(name, dtype or self.compute_dtype)

    def _stored(self, name: str) -> LinearSpec:
        """The spec of one expert, from the shapes of the codes: with expert parallelism, only a part of the stack is loaded."""
        scheme, scale = self.schemes[name], getattr(self, f"{name}_scale")
        columns = self._codes(name)[0, 0].numel() * 8 // scheme.bits
        return LinearSpec(scheme, scale.shape[1], columns, self.compute_dtype, scale.device.type)

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        if name in self.schemes and not self.adapted(name):
            y = self._product(x, read(self, name, self.schemes[name], expert))
        else:
            dense: Tensor = getattr(self, name)[expert]
            y = F.linear(x, dense.T if self.is_transposed else dense)
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def _product(self, x: Tensor, weight: QuantizedTensor) -> Tensor:
        if weight.perm is not None:  # gate and up may have different orders
            parts = [_rows(weight, part, len(weight.perm)) for part in range(len(weight.perm))]
            return torch.cat([self._product(x[:, order], w) for order, w in zip(weight.perm, parts, strict=True)], -1)
        spec = LinearSpec(weight.scheme, weight.scale.shape[0], weight.in_features, self.compute_dtype, x.device.type)
        backend = select(spec, repacking=False)
        y = backend.linear(x, backend.prepare(weight, spec), spec)
        if weight.outliers is not None:
            y = y + outlier_linear(x, weight.outliers.index, weight.outliers.value)
        return y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self._repacked and not self._held:
            return self._at_once(hidden_states, top_k_index, top_k_weights)
        return one_by_one(self, self._project, hidden_states, top_k_index, top_k_weights)

    def _at_once(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        ends, order = by_expert(chosen, self.num_experts)
        hidden = _activated(self, self._stack(_first(self), states, ends, order))
        y = back_in_order(self._stack("down_proj", hidden, ends, None), order).unflatten(0, chosen.shape)
        # added in a fixed order, so that results are reproducible
        return (y * weights[..., None]).sum(1).to(states.dtype)

    def _stack(self, name: str, x: Tensor, ends: Tensor, order: Tensor | None) -> Tensor:
        """The rows that `by_expert` sorted, times the stack of that name."""
        backend: Any = self._backend
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        spec, outliers = self._specs[name], None
        if spec.scheme.outliers:
            outliers = Outliers(getattr(self, f"{name}_outlier_index"), getattr(self, f"{name}_outlier_value"))
        y: Tensor = backend.experts(x, self._repacked[name], spec, ends, order, bias, outliers)
        return y

    def expert_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The float stack of that name, in the layout of the model's own class."""
        dense = self._quantized(name).dequantize(dtype)
        return dense.transpose(-1, -2).contiguous() if self.is_transposed else dense

    @property
    def float_class(self) -> type[nn.Module]:
        """The model's own experts class."""
        return next(c for c in type(self).__mro__ if issubclass(c, nn.Module) and not issubclass(c, Outside))


def one_by_one(
    module: Any, project: Callable[[str, int, Tensor], Tensor], states: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """The output of an experts layer, one expert multiplied after the other.

    Args:
        module: The layer, for its gate and activation.
        project: The product of rows with one expert of the stack of a name: ``project(name, expert, x)``.
        states: ``[M, K]``.
        chosen: int64 ``[M, top_k]``, the experts of each row.
        weights: ``[M, top_k]``, of their outputs.
    """
    out = torch.zeros_like(states)
    for expert in torch.unique(chosen).tolist():
        if expert >= module.num_experts:  # where expert parallelism sends tokens of other ranks
            continue
        token, choice = torch.where(chosen == expert)
        hidden = _activated(module, project(_first(module), expert, states[token]))
        y = project("down_proj", expert, hidden) * weights[token, choice, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def _quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`QuantExperts` mixed into a model's experts class."""
    if cls not in _CLASSES:
        _CLASSES[cls] = type("Quant" + cls.__name__, (QuantExperts, cls), {name: seen(name) for name in STACKED})
    return _CLASSES[cls]


def _blank(cls: type[nn.Module]) -> nn.Module:
    """An uninitialized experts layer, which ``pickle`` then gives a state."""
    quantized_class = _quantized_class(cls)
    return quantized_class.__new__(quantized_class)


def _rows(weight: QuantizedTensor, part: int, parts: int) -> QuantizedTensor:
    """One of ``parts`` equal parts of the rows, with the columns in stored order."""
    zero = None if weight.zero_point is None else weight.zero_point.chunk(parts)[part]
    return QuantizedTensor(weight.qweight.chunk(parts)[part], weight.scale.chunk(parts)[part], zero, weight.scheme)


def _first(module: Any) -> str:
    """Name of the stack that multiplies the input of the layer."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _activated(module: Any, y: Tensor) -> Tensor:
    """The input of the second stack."""
    activated: Tensor = apply_gate(module, y) if module.has_gate else module.act_fn(y)
    return activated


def why_not_experts(module: nn.Module) -> str | None:
    """Why `QuantExperts` cannot run a module with stacked weights; None if it can."""
    if not hasattr(module, "is_transposed") or not has_gate_function(module):
        return "not one of transformers' standard experts layers"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalizes after each expert"
    return None


def stacks(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Name to ``(E, N, K)`` of the stacked weights of an experts layer; empty if ``module`` is no such layer."""
    shapes: dict[str, tuple[int, int, int]] = {}
    for name in STACKED:
        weight: Any = module._parameters.get(name)
        if weight is not None and weight.ndim == 3:
            e, n, k = weight.shape
            shapes[name] = (e, k, n) if getattr(module, "is_transposed", False) else (e, n, k)
    return shapes if "down_proj" in shapes else {}


def expert_input(module: Any, name: str, expert: int, states: Tensor, chosen: Tensor) -> Tensor:
    """The input of the stack ``name`` of a float experts layer for one expert: ``[tokens, K]``.

    Args:
        module: The model's own experts layer.
        name: Name of the stack.
        expert: Number of the expert.
        states: ``[M, K]``, input of the layer.
        chosen: int64 ``[M, top_k]``, the experts of each token.
    """
    x = states[torch.where(chosen == expert)[0]]
    if name != "down_proj":
        return x
    first = _first(module)
    dense: Tensor = getattr(module, first)[expert]
    y = F.linear(x, dense.T if module.is_transposed else dense)
    if module.has_bias:
        y = y + getattr(module, f"{first}_bias")[expert]
    return _activated(module, y)


def as_quant_experts(
    module: nn.Module,
    schemes: dict[str, QuantScheme],
    *,
    quantized: bool,
    scale_dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """Turn ``module`` into a `QuantExperts`, in place. Its parameters are empty: codes, or float placeholders.

    ``scale_dtypes`` names the stacks whose scales have another dtype than the module computes in.
    """
    shapes = stacks(module)
    ordered = [name for name in module._parameters if name in shapes]
    cls = type(module)
    dtype = module.down_proj.dtype
    assert isinstance(dtype, torch.dtype)
    module.__class__ = _quantized_class(cls)
    module.schemes, module.compute_dtype = schemes, dtype  # type: ignore[assignment]
    mark_initialized(module)
    for name, scheme in schemes.items():
        register(module, name, shapes[name], scheme, scale_dtypes.get(name, dtype), codes=quantized)
        if scheme.permuted:
            e, _, k = shapes[name]
            halves = 2 if name == "gate_up_proj" else 1
            module.register_parameter(f"{name}_perm", frozen(torch.empty((e, halves, k), dtype=torch.int32)))
    for name in ordered:  # PEFT nests its adapters in this order, and finds saved ones by it
        module._parameters[name] = module._parameters.pop(name)
