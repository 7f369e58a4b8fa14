"""The size of a quantized model in transformers' methods, which would count codes as weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from hf_quant.kernels import prepared_tensors
from hf_quant.nn._outside import Outside
from hf_quant.nn._repacking import Repacking


def report_true_sizes(model: Any) -> None:
    """Replace ``num_parameters`` and ``get_memory_footprint`` of a quantized ``model``."""
    model.num_parameters = partial(num_parameters, model)
    model.get_memory_footprint = partial(memory_footprint, model)


def report_own_sizes(model: Any) -> None:
    """Undo `report_true_sizes`."""
    for name in ("num_parameters", "get_memory_footprint"):
        model.__dict__.pop(name, None)


def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """The number of parameters of the float model: scales do not count, and tied parameters count once.

    Args:
        model: A quantized model.
        only_trainable: Count only parameters with gradients.
        exclude_embeddings: Leave out embedding tables.
    """
    total, seen = 0, set()
    if exclude_embeddings:
        seen = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for module in model.modules():
        shapes = dict(_float_shapes(module))
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or (only_trainable and not parameter.requires_grad):
                continue
            seen.add(id(parameter))
            if any(name != coded and name != f"{coded}_bias" and name.startswith(f"{coded}_") for coded in shapes):
                continue
            total += math.prod(shapes.get(name, parameter.shape))
    return total


def memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """The bytes that a model takes, including codes repacked for kernels, without counting any memory twice.

    Args:
        model: A quantized model.
        return_buffers: Count buffers too.
    """
    tensors = [*model.parameters(), *(model.buffers() if return_buffers else ())]
    for module in model.modules():
        if isinstance(module, Repacking):
            tensors += [t for prepared in module._repacked.values() for t in prepared_tensors(prepared)]
    total, counted = 0, set()
    for tensor in tensors:
        place = (tensor.device, tensor.data_ptr()) if tensor.device.type != "meta" else id(tensor)
        if place not in counted:
            total += math.prod(tensor.shape) * tensor.element_size()
        if math.prod(tensor.shape):
            counted.add(place)
    return total


def _float_shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Float shapes of the parameters that hold codes, by name."""
    if isinstance(module, Outside):
        for name in module._parameters:
            shape = module.float_shape(name)
            if shape is not None:
                yield name, shape
