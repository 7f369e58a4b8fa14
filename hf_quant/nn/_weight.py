"""The parameters every quantized module holds, under the names and shapes of `formats.native`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_quant.core.packing import unpack_short
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.formats import format_named
from hf_quant.nn._hooks import AWAITED, mark_initialized
from hf_quant.nn._outside import Outside

_NATIVE = format_named("native")


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter no optimizer touches; parameters and not buffers, since accelerate does not offload buffers."""
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
    """Give ``module`` empty parameters ``name``, ``name_scale`` and its other companions for a weight ``[..., N, K]``.

    ``dtype`` is that of the scales, which keep it whatever the module computes in. ``codes=False`` leaves ``name`` as it is: a float placeholder that the loader replaces by codes.
    """
    *lead, n, k = shape
    for local, (size, kind) in _NATIVE.layout((n, k), scheme, dtype).items():
        if codes or local != "weight":
            full = name + local.removeprefix("weight")
            empty = frozen(torch.empty((*lead, *size), dtype=kind))
            mark_initialized(empty, AWAITED)
            module.register_parameter(full, empty)
    # last: some models take the type of a module's first parameter for that of all, and the scales' is the right one
    module._parameters[name] = module._parameters.pop(name)


def read(
    module: Outside, name: str, scheme: QuantScheme, index: int | Tensor | None = None, qweight: Tensor | None = None
) -> QuantizedTensor:
    """The parameters as one value; ``qweight`` stands in for repacked codes.

    ``index`` picks one of a stack, or rows by their numbers; what has a single axis belongs to all rows.
    """
    parts: dict[str, Tensor] = {}
    for local in _NATIVE.suffixes:
        tensor = (
            module._codes(name) if local == "weight" else module._parameters.get(name + local.removeprefix("weight"))
        )
        if tensor is not None:
            parts[local] = tensor if index is None or tensor.ndim == 1 else _picked(tensor, index)
    codes, outliers = parts["weight"], None
    if "weight_outlier_index" in parts:
        outliers = Outliers(parts["weight_outlier_index"], parts["weight_outlier_value"])
    if qweight is None:
        qweight = codes.flatten(-2) if scheme.bits == 8 else codes
    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    if zero is not None and not scheme.real_zero:
        zero = unpack_short(zero, scheme.bits, scale.shape[-1])
    return QuantizedTensor(
        qweight, scale, zero, scheme, parts.get("weight_perm"), outliers, parts.get("weight_input_scale")
    )


def _picked(tensor: Tensor, index: int | Tensor) -> Tensor:
    """As ``tensor[index]``, but as strict about rows as ``nn.Embedding``: a negative number is none of the last rows, and
    truth values are no numbers."""
    if isinstance(index, int):
        return tensor[index]
    return tensor.index_select(0, index.flatten()).view(*index.shape, *tensor.shape[1:])
