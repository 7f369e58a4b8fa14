"""The parameters of every quantized module, with the names and shapes of `core.layout`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hf_quant.core.layout import PARTS, WEIGHT, part_name, shapes_of
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.nn._hooks import AWAITED, mark_initialized
from hf_quant.nn._outside import Outside


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that no optimizer changes. It is not a buffer, since accelerate does not offload buffers."""
    return nn.Parameter(tensor, requires_grad=False)


def register(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    scheme: QuantScheme,
    dtype: torch.dtype,
    *,
    codes: bool = True,
) -> None:
    """Register empty parameters ``name``, ``name_scale`` and other companions for a weight ``[..., N, K]``.

    ``dtype`` is that of the scales, whatever the module computes in. ``codes=False`` keeps ``name``, a float placeholder that the
    loader replaces by codes.
    """
    for part, (size, kind) in shapes_of(shape, scheme, dtype).items():
        if codes or part != WEIGHT:
            empty = frozen(torch.empty(size, dtype=kind))
            mark_initialized(empty, AWAITED)
            module.register_parameter(part_name(name, part), empty)
    # last: some models take the dtype of a module's first parameter for that of all, which is right for the scales
    module._parameters[name] = module._parameters.pop(name)


def read(
    module: Outside, name: str, scheme: QuantScheme, index: int | Tensor | None = None,
    restored: Mapping[str, Tensor] = MappingProxyType({}),
) -> QuantizedTensor:  # fmt: skip
    """The parameters as one value; ``restored`` replaces those of which only a kernel's layout is in memory.

    ``index`` selects one matrix of a stack, or rows by number; tensors with a single axis belong to all rows.
    """
    parts: dict[str, Tensor] = {WEIGHT: module._codes(name)}
    for part in PARTS[1:]:
        if (tensor := module._parameters.get(part_name(name, part))) is not None:
            parts[part] = tensor
    parts |= restored
    if index is not None:
        parts = {part: tensor if tensor.ndim == 1 else _picked(tensor, index) for part, tensor in parts.items()}
    return QuantizedTensor.from_parts(parts, scheme)


def _picked(tensor: Tensor, index: int | Tensor) -> Tensor:
    """``tensor[index]``, but as strict about row numbers as ``nn.Embedding``: negative numbers and booleans are refused."""
    if isinstance(index, int):
        return tensor[index]
    return tensor.index_select(0, index.flatten()).view(*index.shape, *tensor.shape[1:])
