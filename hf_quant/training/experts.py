"""Stacked experts whose float weights are rounded in the forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_quant.core.geometry import geometry_of
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.nn.experts import one_by_one
from hf_quant.training.fake_quantize import fake_quant_linear
from hf_quant.training.modules import SUFFIXES, FakeQuant, refuse_cast, seen

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class FakeQuantExperts(FakeQuant):
    """Mixed into a model's own experts class, in place of `QuantExperts`; one expert is multiplied after the other."""

    schemes: dict[str, QuantScheme]
    num_experts: int
    has_bias: bool
    is_transposed: bool

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles: this class is created at run time and cannot be imported by its name."""
        return _blank, (type(self).__bases__[1],), self.__dict__

    def trained(self) -> dict[str, QuantScheme]:
        return self.schemes

    def _by_rows(self, weight: Tensor) -> Tensor:
        return geometry_of(self).matrix(weight)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        for name in self.schemes:
            refuse_cast(getattr(self, name))
        # all experts at once: taken one by one, each would give back a gradient of the size of the whole stack
        parts = {name: self._experts(name) for name in ("gate_up_proj", "up_proj", "down_proj") if hasattr(self, name)}

        def project(name: str, expert: int, x: Tensor) -> Tensor:
            weight, scale, offset = parts[name][expert]
            if scale is None:
                y = nn.functional.linear(x, weight)
            else:
                scheme = self.schemes[name]
                y = fake_quant_linear(seen(x, scheme), weight, scale, offset, scheme, self.compute_dtype)
            return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

        return one_by_one(self, project, hidden_states, top_k_index, top_k_weights)

    def _experts(self, name: str) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        weight, scale, offset = (self._parameters.get(name + suffix) for suffix in SUFFIXES)
        assert weight is not None
        nothing = [None] * self.num_experts
        parts = [nothing if part is None else part.unbind(0) for part in (scale, offset)]
        return list(zip(self._by_rows(weight).unbind(0), *parts, strict=True))


def as_fake_quant_experts(module: Any, starts: dict[str, QuantizedTensor]) -> None:
    """Make a model's own experts layer a `FakeQuantExperts` in place.

    Args:
        module: In floating point.
        starts: Each of its stacks quantized, by name: from these scales and zero points begin.
    """
    dtype = module.down_proj.dtype
    module.__class__ = _trainable_class(type(module))
    module.schemes, module.compute_dtype = {name: start.scheme for name, start in starts.items()}, dtype
    for name, start in starts.items():
        module._register(name, module._parameters[name].detach(), start)


def _trainable_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of trainable experts that takes the place of ``cls``."""
    if cls not in _CLASSES:
        _CLASSES[cls] = type("FakeQuant" + cls.__name__, (FakeQuantExperts, cls), {})
    return _CLASSES[cls]


def _blank(cls: type[nn.Module]) -> nn.Module:
    """An uninitialized experts layer, which ``pickle`` then gives a state."""
    trainable_class = _trainable_class(cls)
    return trainable_class.__new__(trainable_class)
