"""What kernels use of PyTorch beyond its public interface, each with a fallback for the day it is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_quant.errors import KernelError


def private(path: str) -> Any:
    """``torch.<path>``, or None where this version of PyTorch has no such thing."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# Looked up once: a walk through modules is memory that a product has driven out of the caches.
_compiling, _grad = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
_modes = private("_C._len_torch_dispatch_stack")
_transforms = private("_C._functorch.peek_interpreter_stack")
_tracing = private("_C._is_tracing")
_forward_mode = vars(forward_ad)
_all_known = None not in (_modes, _transforms, _tracing) and "_current_level" in _forward_mode


def nobody_looks(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor of a CPU, and no transformation, tracer or gradient needs to see the operation.

    PyTorch's dispatcher, which takes as long as a small product, may then be passed by. False where PyTorch does not tell.
    """
    return (
        _all_known
        and not _compiling()
        and type(x) is Tensor
        and x.is_cpu
        and not x.is_neg()
        and not (_grad() and x.requires_grad)
        and not _modes()
        and _transforms() is None
        and not _tracing()
        and _forward_mode.get("_current_level", 0) < 0
    )


def refuse_forward_mode(x: Tensor) -> None:
    """Refuse an ``x`` that carries a tangent of forward-mode differentiation, which PyTorch's custom operations drop."""
    if _forward_mode.get("_current_level", 0) >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise KernelError(
            "forward-mode differentiation (torch.func.jvp) is not supported by quantized layers; gradients are, and "
            "dequantize() gives weights that support both"
        )


_Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
# what compiled graphs call; `torch.empty` takes 3 to 6 us more after a product has driven PyTorch out of the caches
_compiled_empty: _Empty | None = private("_C._dynamo.guards._empty_strided_cpu")


def _plain_empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


empty_on_cpu: _Empty = _compiled_empty or _plain_empty
