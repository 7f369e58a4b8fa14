"""New codes for a weight that has changed, on the grid that it has."""

from __future__ import annotations

from torch import Tensor

from hf_quant.core.geometry import geometry_of
from hf_quant.core.layout import WEIGHT, part_name
from hf_quant.nn._repacking import Repacking
from hf_quant.nn.embedding import QuantEmbedding


def requantize(module: Repacking | QuantEmbedding, name: str, weight: Tensor) -> None:
    """Give a parameter that holds codes those nearest to ``weight``; scales, zero points and positions of outliers stay.

    Args:
        module: A quantized module.
        name: Of the parameter.
        weight: Floating point, in the shape of ``module.float_shape(name)``.
    """
    held = module.quantized_weight() if isinstance(module, QuantEmbedding) else module._quantized(name)
    quantized = held.nearest_to(geometry_of(module).matrix(weight))
    parts = quantized.parts()
    if isinstance(module, Repacking):
        module._unpack()
    for part in (WEIGHT, "weight_outlier_value"):
        if part in parts:
            parameter = module._parameters[part_name(name, part)]
            assert parameter is not None
            parameter.data = parts[part]
    if isinstance(module, Repacking):
        module.choose_kernel()
