"""A convolution over patches that do not overlap, with a quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_quant.core.geometry import Patches
from hf_quant.core.scheme import QuantScheme
from hf_quant.nn.matrix import QuantMatrix


class QuantPatches(QuantMatrix):
    """Drop-in for an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` that is a linear map of each patch, such as one of size 1.

    Args:
        geometry: Of the convolution.
        out_features: N, its output channels.
        scheme: The quantization of the weight ``[N, K]``; K is the number of values in a patch.
        bias: Whether the layer has a bias.
        dtype: In which the layer computes; also that of the bias.
        scale_dtype: The dtype of scales; None for ``dtype``.
        quantized: Whether ``weight`` holds codes, or a float placeholder that loading quantizes.
    """

    geometry: Patches

    def __init__(
        self, geometry: Patches, out_features: int, scheme: QuantScheme, *, bias: bool, dtype: torch.dtype,
        scale_dtype: torch.dtype | None = None, quantized: bool = True,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.geometry = geometry
        # models read these to compute the sizes of outputs
        self.in_channels, self.out_channels, self.kernel_size = geometry.channels, out_features, geometry.kernel
        axes = len(geometry.kernel)
        self.stride, self.padding, self.dilation, self.groups = geometry.stride, (0,) * axes, (1,) * axes, 1
        self._build(
            (out_features, geometry.columns), scheme, bias=bias, dtype=dtype, scale_dtype=scale_dtype, quantized=quantized
        )  # fmt: skip

    def float_shape(self, name: str) -> tuple[int, ...] | None:
        return (self.out_features, self.geometry.channels, *self.geometry.kernel) if name == "weight" else None

    def forward(self, x: Tensor) -> Tensor:
        return self.geometry.output(super().forward(self.geometry.rows(x)))

    def extra_repr(self) -> str:
        geometry = self.geometry
        return (
            f"{geometry.channels}, {self.out_features}, kernel_size={geometry.kernel}, stride={geometry.stride}, "
            f"bias={self.bias is not None}, scheme={self.scheme}"
        )
