"""INT8 activations in floating point, for training: gradients pass straight through the rounding."""

from __future__ import annotations

from torch import Tensor

from hf_quant.core.numerics import quantize_rows
from hf_quant.core.tensor import QuantizedTensor


def rounded(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """The inputs ``x [..., K]`` of a layer as its scheme rounds them; outlier columns, and thresholds, stay as they are."""
    if weight.scheme.activations not in ("token", "tensor"):
        return x
    plain = x.detach()
    if weight.scheme.outlier_columns and weight.outliers is not None:
        columns = weight.outliers.index.long().to(x.device)
        plain = plain.index_fill(-1, columns[columns < x.shape[-1]], 0)  # padding may be among them
    scale = None if weight.input_scale is None else weight.input_scale.float().to(x.device)
    codes, scale = quantize_rows(plain, scale)
    return x + (codes * scale - plain).to(x.dtype)
