"""Quantized layers whose scales are trained while their codes stay as they are: no float copy of a weight is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.activations import rounded
from hf_quant.core.numerics import floored, padded
from hf_quant.core.pieces import rows_at
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.nn import QuantExperts, QuantMatrix
from hf_quant.nn._weight import read


class ScaledProduct(torch.autograd.Function):
    """``x W^T``, where the backward pass dequantizes ``W`` again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, weight: QuantizedTensor) -> Tensor:
        """``x [..., K]``, ``scale`` float32 ``[N, G]`` in place of that of ``weight [N, K]``."""
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return x @ _real(weight, scale).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (x, scale) = gradients, ctx.saved_tensors
        slope = gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()
        steps = replace(ctx.weight, scale=torch.ones_like(scale), outliers=None).dequantize(torch.float32)
        by_scale = (slope * steps).unflatten(-1, (scale.shape[-1], -1)).sum(-1)
        return gradient @ _real(ctx.weight, scale).to(gradient.dtype), by_scale, None


def _real(weight: QuantizedTensor, scale: Tensor) -> Tensor:
    return replace(weight, scale=scale).dequantize(torch.float32)


def product(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """A layer's output ``[..., N]`` for ``x [..., K]``, differentiable in both and in ``weight.scale [N, G]``."""
    if weight.perm is not None:  # each part of the rows has an order of its own
        rows = [torch.arange(len(weight.scale)).chunk(len(weight.perm))[part] for part in range(len(weight.perm))]
        parts = [
            product(x.index_select(-1, order), replace(rows_at(weight, positions), perm=None))
            for order, positions in zip(weight.perm, rows, strict=True)
        ]
        return torch.cat(parts, -1)
    result: Tensor = ScaledProduct.apply(rounded(x, weight), weight.scale, weight)  # type: ignore[no-untyped-call]
    return result


class Moving:
    """Scales that are trained in steps relative to their size, and are at all times what will be stored.

    Gradients pass straight through the rounding to the stored dtype (arXiv:1308.3432).

    Args:
        parameter: Of a model.
        dtype: What it is stored in.

    Attributes:
        moved: float32, like the parameter: how far from where it began, in shares of that.
    """

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        self.parameter, self.dtype, self.first = parameter, dtype, parameter.data.float().clone()
        self.moved = nn.Parameter(torch.zeros_like(self.first))

    def take(self) -> bool:
        """Hand the gradient of the parameter on; whether it is finite."""
        gradient, self.parameter.grad = self.parameter.grad, None
        self.moved.grad = torch.zeros_like(self.first) if gradient is None else gradient.float() * self.first
        return bool(self.moved.grad.isfinite().all())

    def put(self) -> None:
        """Give the parameter its new values."""
        self.parameter.data.copy_(floored(self.first + self.first * self.moved.data, self.dtype))


@contextmanager
def trainable_scales(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The scales of every quantized layer and stack of experts, as float32 parameters that receive gradients inside.

    Everything else of the model is frozen. Afterwards the layers hold the scales as they are then, in their own dtype, and
    compute with their kernels again. Quantized embeddings and output heads that share their codes are left alone.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (QuantMatrix, QuantExperts)) and not getattr(module, "shares_codes", False)
    }
    for module in layers.values():
        module._unpack()
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    originals = {
        f"{name}.{scale}": (module, scale, module.get_parameter(scale))
        for name, module in layers.items()
        for scale in (f"{weight}_scale" for weight in module._schemes())
    }
    for module, scale, parameter in originals.values():
        module._parameters[scale] = nn.Parameter(parameter.data.float())
    for module in layers.values():
        _compute_with_scales(module)
    try:
        yield {name: module.get_parameter(scale) for name, (module, scale, _) in originals.items()}
    finally:
        for module, scale, parameter in originals.values():
            parameter.data.copy_(floored(module.get_parameter(scale).data, parameter.dtype))
            module._parameters[scale] = parameter
        for module in layers.values():
            del module.__dict__["forward" if isinstance(module, QuantMatrix) else "_product"]
            module.choose_kernel()
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)


def _compute_with_scales(module: Any) -> None:
    """Let a module multiply so that its scales receive gradients."""

    def linear(x: Tensor) -> Tensor:
        rows = padded(module.geometry.rows(x), module.scheme)
        y = product(rows, read(module, "weight", module.scheme.stored))
        return module.geometry.output(y if module.bias is None else y + module.bias.to(y.dtype))

    computation, name = (linear, "forward") if isinstance(module, QuantMatrix) else (product, "_product")
    module.__dict__[name] = computation
