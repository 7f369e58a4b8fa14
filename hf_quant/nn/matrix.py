"""What all layers have in common that multiply by one quantized matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant.core.geometry import Geometry
from hf_quant.core.numerics import padded
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.kernels import LinearSpec, outlier_linear, select
from hf_quant.nn._hooks import mark_initialized
from hf_quant.nn._outside import seen
from hf_quant.nn._repacking import Repacking
from hf_quant.nn._weight import frozen, read, register


class QuantMatrix(Repacking):
    """A layer that multiplies the rows of its input by one quantized matrix ``[N, K]``.

    Its parameters are those of `core.layout`. `choose_kernel` is called after loading and after every move. After `finished`, code
    outside of this package sees ``weight`` as a float tensor.

    Attributes:
        in_features: K.
        out_features: N.
        scheme: The quantization of the matrix.
        geometry: How inputs and outputs, and the float weight, relate to rows and to the matrix.
    """

    weight = seen("weight")
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    weight_outlier_index: nn.Parameter
    weight_outlier_value: nn.Parameter
    weight_perm: nn.Parameter
    weight_input_scale: nn.Parameter
    bias: Any  # a parameter or None; nn.Linear says otherwise
    in_features: int
    out_features: int
    scheme: QuantScheme
    geometry: Geometry
    shares_codes: bool = False  # True if the embeddings use the same codes

    def _build(
        self, shape: tuple[int, int], scheme: QuantScheme, *, bias: bool, dtype: torch.dtype, scale_dtype: torch.dtype | None,
        quantized: bool,
    ) -> None:  # fmt: skip
        """Register the parameters of a matrix of that shape, with the arguments of the classes beneath."""
        self.out_features, self.in_features = shape
        self.scheme = scheme
        self.compute_dtype = dtype  # PEFT gives its adapters this dtype
        if not quantized:
            self.weight = frozen(self.geometry.weight(torch.empty(shape, dtype=dtype)).contiguous())
        register(self, "weight", shape, scheme, scale_dtype or dtype, codes=quantized)
        self.register_parameter("bias", frozen(torch.empty(shape[0], dtype=dtype)) if bias else None)
        mark_initialized(self)

    @property
    def spec(self) -> LinearSpec:
        """What a kernel needs to know about this layer."""
        device, columns = self.weight_scale.device.type, self.scheme.columns(self.in_features)
        return LinearSpec(self.scheme.stored, self.out_features, columns, self.compute_dtype, device)

    def quantized_weight(self) -> QuantizedTensor:
        """The matrix in the portable layout; its codes are copied if a kernel has repacked them."""
        return self._quantized("weight")

    def choose_kernel(self) -> None:
        self._unpack()
        if self.weight_scale.device.type == "meta":
            return
        self._specs = {"weight": self.spec}
        self._backend = select(self._specs["weight"], repacking=not self.keeps_layout)
        if self._backend.repacks:
            self._repack("weight", shared=self.shares_codes)

    def float_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.geometry.weight(self.dequantize(dtype or self.compute_dtype))

    def _schemes(self) -> Mapping[str, QuantScheme]:
        return {"weight": self.scheme}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float matrix ``[N, K]``."""
        return self.quantized_weight().dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The output ``[..., N]`` for rows ``x [..., K]``."""
        if self._held:
            product: Any = torch.compiler.disable(self._by_parametrized)  # Dynamo cannot trace the float view of codes
            return cast(Tensor, product(x))
        prepared = self._repacked.get("weight")
        spec = self.spec if prepared is None else self._specs["weight"]
        if self._backend is None:
            self._backend = select(spec, repacking=False)
        if prepared is None:
            prepared = self._backend.prepare(read(self, "weight", spec.scheme), spec)
        x = padded(x, self.scheme)
        if self.scheme.permuted:
            x = x.index_select(-1, self.weight_perm[0])
        fused = getattr(self._backend, "fused", None)
        if fused is not None:
            outliers = Outliers(self.weight_outlier_index, self.weight_outlier_value) if self.scheme.outliers else None
            output: Tensor = fused(x, prepared, spec, self.bias, outliers)
            return output
        y = self._backend.linear(x, prepared, spec)
        if self.scheme.outliers:
            y = y + outlier_linear(x, self.weight_outlier_index, self.weight_outlier_value)
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)

    def _by_parametrized(self, x: Tensor) -> Tensor:
        """The output where `torch.nn.utils.parametrize` computes the weight, as with PEFT's ``target_parameters``."""
        bias: Tensor | None = self.bias
        weight = self.geometry.matrix(self.weight)
        return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))
