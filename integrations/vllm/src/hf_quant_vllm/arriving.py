"""Tensors of a layer, kept as they come from the checkpoint until all are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.utils import set_weight_attrs

NAMES = {  # dtypes so wide that vLLM has nothing to warn of
    "weight": torch.uint8,
    "weight_scale": torch.float32,
    "weight_zero_point": torch.uint8,
    "weight_perm": torch.int32,
    "weight_outlier_index": torch.int16,
    "weight_outlier_value": torch.float32,
    "weight_input_scale": torch.float32,
    "weight_scale_code": torch.uint8,
    "weight_zero_point_code": torch.uint8,
}
Arrived = dict[Any, dict[str, Tensor]]  # by part of the layer, then by the end of the name


def expect(layer: nn.Module, prefix: str, loader: Callable[[str], Callable[..., Any]]) -> None:
    """Register empty parameters, whose loaders vLLM calls with what the checkpoint has under their names.

    Args:
        layer: Of vLLM.
        prefix: Before each name: ``"w13_"`` for experts.
        loader: Gives the loader of a name in `NAMES`.
    """
    for name, dtype in NAMES.items():
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": loader(name)})
        layer.register_parameter(prefix + name, parameter)


def forget(layer: nn.Module, prefix: str) -> torch.device:
    """Remove the empty parameters; gives their device."""
    device = layer.get_parameter(prefix + "weight").device
    for name in NAMES:
        delattr(layer, prefix + name)
    return device
