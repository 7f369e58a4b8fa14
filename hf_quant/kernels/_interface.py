"""What a kernel is: the layer it is asked to run, and the protocol of a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """All a backend may look at to decide whether it can run a layer.

    Attributes:
        scheme: How the weight is coded.
        out_features: N.
        in_features: K.
        dtype: What the model computes in; activations of another dtype may still arrive (autocast).
        device: ``"cpu"``, ``"cuda"``, ...
    """

    scheme: QuantScheme
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: str


@runtime_checkable
class LinearBackend(Protocol):
    """One way to run a quantized linear layer.

    A backend may also have ``fused(x, prepared, spec, bias, outliers)``: `linear` with both added before it rounds; and
    ``experts(x, prepared, spec, ends, order, bias, outliers)``: the same for a stack of weights, rows sorted by `by_expert`.

    Attributes:
        priority: Backends are tried from the highest to the lowest.
        repacks: Whether `prepare` lays the codes out anew, once at load, in place of the portable ones;
            if not, it only makes views and may be called at every step.

    One that multiplies INT8 activations says so by a class attribute ``int8_activations = True``: it gets those layers and
    no others.
    """

    priority: ClassVar[int]
    repacks: ClassVar[bool]

    def why_not(self, spec: LinearSpec) -> str | None:
        """Why this backend cannot run ``spec``, or None if it can."""
        ...

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> tuple[Tensor, ...]:
        """The tensors `linear` reads."""
        ...

    def restore(self, prepared: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        """The portable ``qweight``, bit for bit; only called where ``repacks``."""
        ...

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        """``[..., K]`` to ``[..., N]``, in the dtype of ``x``; differentiable in ``x``."""
        ...
