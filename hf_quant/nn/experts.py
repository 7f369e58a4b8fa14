"""Mixture-of-experts layers that keep all experts in stacked 3-D parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant.kernels import LinearSpec, outlier_linear, select
from hf_quant.nn._weight import frozen, read, register
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import QuantizedTensor

STACKED = ("gate_up_proj", "up_proj", "down_proj")  # what transformers calls the stacks, where a layer has them
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class QuantExperts(nn.Module):
    """Mixed into a model's own experts class, whose gate, activation and flags stay as they are.

    Every stack ``[E, N, K]`` becomes codes ``[E, N, K / 8 * bits]`` with ``_scale`` and other companions beside it;
    transposed stacks ``[E, K, N]`` (gpt-oss) are turned while they are quantized.
    """

    schemes: dict[str, QuantScheme]
    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    compute_dtype: torch.dtype

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        if name in self.schemes:
            y = self._product(x, read(self, name, self.schemes[name], expert))
        else:
            dense: Tensor = getattr(self, name)[expert]
            y = F.linear(x, dense.T if self.is_transposed else dense)
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def _product(self, x: Tensor, weight: QuantizedTensor) -> Tensor:
        if weight.perm is not None:  # gate and up have an order of their own each
            parts = [_rows(weight, part, len(weight.perm)) for part in range(len(weight.perm))]
            return torch.cat([self._product(x[:, order], w) for order, w in zip(weight.perm, parts, strict=True)], -1)
        spec = LinearSpec(weight.scheme, weight.scale.shape[0], weight.in_features, self.compute_dtype, x.device.type)
        backend = select(spec, repacking=False)
        y = backend.linear(x, backend.prepare(weight, spec), spec)
        if weight.outliers is not None:
            y = y + outlier_linear(x, weight.outliers.index, weight.outliers.value)
        return y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        hit = torch.unique(top_k_index).tolist()
        for expert in hit:
            if expert >= self.num_experts:  # where expert parallelism sends tokens of other ranks
                continue
            token, choice = torch.where(top_k_index == expert)
            x = hidden_states[token]
            if self.has_gate:
                hidden = self._apply_gate(self._project("gate_up_proj", expert, x))  # type: ignore[operator]
            else:
                hidden = self.act_fn(self._project("up_proj", expert, x))  # type: ignore[operator]
            y = self._project("down_proj", expert, hidden) * top_k_weights[token, choice, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def expert_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The float stack of that name, in the shape the model's own class holds it."""
        dense = read(self, name, self.schemes[name]).dequantize(dtype)
        return dense.transpose(-1, -2).contiguous() if self.is_transposed else dense

    @property
    def float_class(self) -> type[nn.Module]:
        """The model's own experts class."""
        return next(c for c in type(self).__mro__ if issubclass(c, nn.Module) and not issubclass(c, QuantExperts))


def _rows(weight: QuantizedTensor, part: int, parts: int) -> QuantizedTensor:
    """The rows of one of equal parts, their columns in the order they are stored in."""
    zero = None if weight.zero_point is None else weight.zero_point.chunk(parts)[part]
    return QuantizedTensor(weight.qweight.chunk(parts)[part], weight.scale.chunk(parts)[part], zero, weight.scheme)


def why_not_experts(module: nn.Module) -> str | None:
    """Why a module with stacked weights cannot be run by `QuantExperts`, or None if it can."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "_apply_gate"):
        return "not one of transformers' standard experts layers"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalizes after each expert"
    return None


def stacks(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Name to ``(E, N, K)`` of the stacked weights of an experts layer; empty if it is none."""
    found: dict[str, tuple[int, int, int]] = {}
    for name in STACKED:
        weight: Any = module._parameters.get(name)
        if weight is not None and weight.ndim == 3:
            e, n, k = weight.shape
            found[name] = (e, k, n) if getattr(module, "is_transposed", False) else (e, n, k)
    return found if "down_proj" in found else {}


def expert_input(module: Any, name: str, expert: int, states: Tensor, chosen: Tensor) -> Tensor:
    """What the stack ``name`` of a float experts layer is given for one expert: ``[tokens, K]``.

    Args:
        module: The model's own experts layer.
        name: Of the stack.
        expert: Its number.
        states: ``[M, K]``, what the layer is given.
        chosen: int64 ``[M, top_k]``, the experts of each token.
    """
    x = states[torch.where(chosen == expert)[0]]
    if name != "down_proj":
        return x
    first = "gate_up_proj" if module.has_gate else "up_proj"
    dense: Tensor = getattr(module, first)[expert]
    y = F.linear(x, dense.T if module.is_transposed else dense)
    if module.has_bias:
        y = y + getattr(module, f"{first}_bias")[expert]
    gated: Tensor = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    return gated


def as_quant_experts(
    module: nn.Module,
    schemes: dict[str, QuantScheme],
    *,
    quantized: bool,
    scale_dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """Make ``module`` a `QuantExperts` in place, its parameters empty codes (or, not ``quantized``, placeholders).

    ``scale_dtypes`` names the stacks whose scales have another dtype than the module computes in.
    """
    shapes = stacks(module)
    cls = type(module)
    dtype = module.down_proj.dtype
    assert isinstance(dtype, torch.dtype)
    module.__class__ = _CLASSES.setdefault(cls, type("Quant" + cls.__name__, (QuantExperts, cls), {}))
    module.schemes, module.compute_dtype, module._is_hf_initialized = schemes, dtype, True  # type: ignore[assignment]
    for name, scheme in schemes.items():
        register(module, name, shapes[name], scheme, scale_dtypes.get(name, dtype), codes=quantized)
        if scheme.permuted:
            e, _, k = shapes[name]
            halves = 2 if name == "gate_up_proj" else 1
            module.register_parameter(f"{name}_perm", frozen(torch.empty((e, halves, k), dtype=torch.int32)))
