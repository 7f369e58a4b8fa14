"""Runs every quantized layer with its kernel and with plain products on the same inputs, which shows errors of a kernel.

Logits do not show them: one value that is rounded to the next step of an INT8 grid changes everything after it, so two correct
kernels can give very different logits for a model whose activations have outliers.

Where token ids do not reach a layer, such as those of a model of images or sounds, it gets random inputs of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant.core.numerics import padded
from hf_quant.core.scheme import THRESHOLD
from hf_quant.hf.auto import other_inputs
from hf_quant.hf.loading import sample_logits
from hf_quant.kernels._shared.rounded import round_activations
from hf_quant.nn import QuantEmbedding, QuantExperts, QuantMatrix

ROWS = 16  # random inputs of a layer
STRONG = 16  # of so many channels one is so many times as strong as the others, like outliers of real activations


@dataclass(frozen=True)
class Replay:
    """How far kernels are from plain products.

    Attributes:
        logits: Of a few token ids; None for a model that reads something else, which was not run as a whole.
        errors: Name of the layer to relative error: the norm of the difference over that of the plain output.
        reached: How many layers were compared on what the token ids gave them; the others were on random inputs.
        reads: What the model reads if that is more than token ids.
    """

    logits: Tensor | None
    errors: dict[str, float]
    reached: int
    reads: str | None

    def __str__(self) -> str:
        """A sentence on what was compared."""
        rest = len(self.errors) - self.reached
        parts = [f"{self.reached} on what a few token ids give them"] if self.reached else []
        parts += [f"{rest} on random inputs"] if rest else []
        unrun = f"; the model reads {self.reads} and was not run as a whole" if self.reads is not None else ""
        return f"the kernels of {len(self.errors)} layers give what plain products give: {', '.join(parts)}{unrun}"


@torch.no_grad()
def replay(model: Any) -> Replay:
    """The difference of each layer's output from the plain product on the same inputs.

    Args:
        model: Quantized; unchanged afterwards.
    """
    inputs: dict[str, tuple[tuple[Any, ...], Tensor]] = {}
    layers = {
        name: module for name, module in model.named_modules()
        if isinstance(module, (QuantMatrix, QuantEmbedding, QuantExperts))
    }  # fmt: skip

    def keep(name: str) -> Any:
        return lambda module, args, output: inputs.setdefault(name, (args, output)) and None

    reads = other_inputs(type(model), model.config)
    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        logits = sample_logits(model) if reads is None else None
    finally:
        for hook in hooks:
            hook.remove()
    reached = len(inputs)
    for name in layers.keys() - inputs.keys():
        args = _random(layers[name])
        inputs[name] = args, layers[name](*args)
    return Replay(logits, {name: _error(layers[name], *inputs[name]) for name in layers}, reached, reads)


def _random(module: Any) -> tuple[Tensor, ...]:
    """Arguments for a layer, the same every time."""
    draws = torch.Generator().manual_seed(0)
    device = next(module.parameters()).device
    if isinstance(module, QuantEmbedding):
        return (torch.randint(module.num_embeddings, (1, ROWS), generator=draws).to(device),)
    x = torch.randn(1, ROWS, _width(module), generator=draws, dtype=torch.float32)
    x[..., ::STRONG] *= STRONG
    x = x.to(device, module.compute_dtype)
    if isinstance(module, QuantMatrix):
        if module.scheme.activations == "tensor":  # within the stored range
            x = x / x.abs().max() * module.weight_input_scale.to(x.dtype) * 127
        return (module.geometry.input(x),)
    experts = torch.rand(ROWS, module.num_experts, generator=draws, dtype=torch.float32).topk(
        min(2, module.num_experts)
    )
    return x[0], experts.indices.to(device), experts.values.to(device, x.dtype)


def _width(module: Any) -> int:
    if isinstance(module, QuantMatrix):
        return module.in_features
    shape = module.float_shape("down_proj") or module.down_proj.shape
    return int(shape[-1] if module.is_transposed else shape[1])


def _error(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> float:
    if isinstance(module, QuantEmbedding):
        plain = F.embedding(args[0], module.dequantize(torch.float32))
    else:
        plain = (_linear(module, args[0]) if isinstance(module, QuantMatrix) else _by_reference(module, args)).float()
    return float((output.float() - plain).norm() / plain.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _linear(layer: QuantMatrix, x: Tensor) -> Tensor:
    """``F.linear`` with the layer's dequantized weight, in float32, and activations rounded as its scheme says."""
    x = layer.geometry.rows(x)
    if layer.scheme.activations is not None:
        columns = layer.weight_outlier_index if layer.scheme.outlier_columns else None
        scale = layer.weight_input_scale if layer.scheme.activations == "tensor" else None
        threshold = THRESHOLD if layer.scheme.activations == "threshold" else 0.0
        x = padded(x, layer.scheme)
        rounded = round_activations(x.reshape(-1, x.shape[-1]), columns, scale, threshold).view(x.shape)
        x = rounded if columns is None else rounded.index_copy(-1, columns.long(), x.index_select(-1, columns.long()))
    bias = None if layer.bias is None else layer.bias.float()
    return layer.geometry.output(F.linear(x[..., : layer.in_features].float(), layer.dequantize(torch.float32), bias))


def _by_reference(module: Any, args: tuple[Any, ...]) -> Tensor:
    """The output of the module with dequantized weights."""
    with _backend("reference"):
        module.choose_kernel()
        output: Tensor = module(*args)
    module.choose_kernel()
    return output


@contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get("HF_QUANT_BACKEND")
    os.environ["HF_QUANT_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_QUANT_BACKEND"]
        else:
            os.environ["HF_QUANT_BACKEND"] = before
