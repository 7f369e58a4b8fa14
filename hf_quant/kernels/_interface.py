"""What a kernel is: the layer it is asked to run, and the protocol of a backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor

P = TypeVar("P")  # a frozen dataclass: the weight as a backend reads it


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
class LinearBackend(Protocol[P]):
    """One way to run a quantized linear layer, from a weight that it has prepared as a ``P``.

    ``P`` is a frozen dataclass whose fields have names; `prepared_tensors` finds the tensors in it.

    A backend may also have ``fused(x, prepared, spec, bias, outliers)``: `linear` with both added before it rounds; and
    ``experts(x, prepared, spec, ends, order, bias, outliers)``: the same for a stack of weights, rows sorted by `by_expert`.

    One whose layout holds scales and zero points has ``scales(prepared, spec)``: they as parts by name (`core.layout`). Those that are
    to the last bit what the module holds, but for their dtype, are then in memory once, in the layout.

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

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> P:
        """The weight as `linear` reads it."""
        ...

    def restore(self, prepared: P, spec: LinearSpec) -> Tensor:
        """The portable ``qweight``, bit for bit; only called where ``repacks``."""
        ...

    def linear(self, x: Tensor, prepared: P, spec: LinearSpec) -> Tensor:
        """``[..., K]`` to ``[..., N]``, in the dtype of ``x``; differentiable in ``x``."""
        ...


def prepared_tensors(prepared: object) -> Iterator[Tensor]:
    """The tensors of what `LinearBackend.prepare` returned, those of dataclasses inside it too."""
    if isinstance(prepared, Tensor):
        yield prepared
    elif is_dataclass(prepared):
        for field in fields(prepared):
            yield from prepared_tensors(getattr(prepared, field.name))
