"""Weights of kinds that are never quantized: the plan lists them too, so that nothing is left out silently."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def others(model: Any, known: Collection[str]) -> dict[str, str]:
    """Name of each matrix, table or convolution that is not a candidate, to the reason why it stays in floating point.

    Args:
        model: Before any module is replaced; may be on the meta device.
        known: Names of the candidates.
    """
    reasons, known = {}, set(known)
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}".removeprefix(".")
            matrix = parameter.is_floating_point() and parameter.ndim >= 2 and min(parameter.shape[-2:]) > 1
            if (matrix or (isinstance(module, CONVOLUTIONS) and leaf == "weight")) and not {path, name} & known:
                reasons[path if leaf == "weight" else name] = _reason(module)
    return reasons


def _reason(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "a table besides the input embeddings"
    if isinstance(module, CONVOLUTIONS):
        return "a convolution whose patches overlap, are padded, or share their channels out to groups"
    return f"{type(module).__name__} computes with its weights in its own way"
