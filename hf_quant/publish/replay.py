"""Runs every quantized layer with its kernel and with plain products on the same inputs, which shows errors of a kernel.

Logits do not show them: one value that is rounded to the next step of an INT8 grid changes everything after it, so two correct
kernels can give very different logits for a model whose activations have outliers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant.core.numerics import padded
from hf_quant.core.scheme import THRESHOLD
from hf_quant.hf.loading import sample_logits
from hf_quant.kernels._shared.rounded import round_activations
from hf_quant.nn import QuantEmbedding, QuantExperts, QuantLinear


@torch.no_grad()
def replay(model: Any) -> tuple[Tensor, dict[str, float]]:
    """Logits of a few tokens, and the difference of each layer's output from the plain product on the same inputs.

    Args:
        model: Quantized; unchanged afterwards.

    Returns:
        Logits, and name of the layer to relative error: the norm of the difference over that of the plain output.
    """
    inputs: dict[str, tuple[tuple[Any, ...], Tensor]] = {}
    layers = {
        name: module for name, module in model.named_modules()
        if isinstance(module, (QuantLinear, QuantEmbedding, QuantExperts))
    }  # fmt: skip

    def keep(name: str) -> Any:
        return lambda module, args, output: inputs.setdefault(name, (args, output)) and None

    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        logits = sample_logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, {name: _error(layers[name], *seen) for name, seen in inputs.items()}


def _error(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> float:
    if isinstance(module, QuantEmbedding):
        plain = F.embedding(args[0], module.dequantize(torch.float32))
    else:
        plain = (_linear(module, args[0]) if isinstance(module, QuantLinear) else _by_reference(module, args)).float()
    return float((output.float() - plain).norm() / plain.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _linear(layer: QuantLinear, x: Tensor) -> Tensor:
    """``F.linear`` with the layer's dequantized weight, in float32, and activations rounded as its scheme says."""
    if layer.scheme.activations is not None:
        columns = layer.weight_outlier_index if layer.scheme.outlier_columns else None
        scale = layer.weight_input_scale if layer.scheme.activations == "tensor" else None
        threshold = THRESHOLD if layer.scheme.activations == "threshold" else 0.0
        x = padded(x, layer.scheme)
        rounded = round_activations(x.reshape(-1, x.shape[-1]), columns, scale, threshold).view(x.shape)
        x = rounded if columns is None else rounded.index_copy(-1, columns.long(), x.index_select(-1, columns.long()))
    return F.linear(
        x[..., : layer.in_features].float(),
        layer.dequantize(torch.float32),
        None if layer.bias is None else layer.bias.float(),
    )


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
