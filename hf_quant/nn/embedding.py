"""An embedding table with quantized rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.nn._hooks import mark_initialized
from hf_quant.nn._outside import Outside, seen
from hf_quant.nn._weight import frozen, read, register

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantEmbedding(Outside, nn.Embedding):
    """Drop-in for ``nn.Embedding(V, K)``: only the rows looked up are dequantized.

    Args:
        num_embeddings: V.
        embedding_dim: K, which the padding of the scheme makes a multiple of 32.
        scheme: The quantization of a row.
        padding_idx: As in ``nn.Embedding``, but without effect on gradients, which do not reach a quantized table.
        dtype: The dtype of returned rows and of scales.
        quantized: Whether the table holds codes, or a float placeholder that loading quantizes.
    """

    weight = seen("weight")
    weight_scale: nn.Parameter

    def __init__(
        self, num_embeddings: int, embedding_dim: int, scheme: QuantScheme, *, padding_idx: int | None,
        dtype: torch.dtype, quantized: bool = True,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.scheme = scheme
        self._row_dtype = None if scheme.scale_bits is None else dtype  # None: that of scales
        if not quantized:
            self.weight = frozen(torch.empty(num_embeddings, embedding_dim, dtype=dtype))
        register(self, "weight", (num_embeddings, embedding_dim), scheme, dtype, codes=quantized)
        mark_initialized(self)

    @property
    def compute_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of returned rows."""
        return self._row_dtype or self.weight_scale.dtype

    def float_shape(self, name: str) -> tuple[int, ...] | None:
        return (self.num_embeddings, self.embedding_dim) if name == "weight" else None

    def float_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.dequantize(dtype or self.compute_dtype)

    def quantized_weight(self) -> QuantizedTensor:
        """The table in the portable layout."""
        return read(self, "weight", self.scheme)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float table ``[V, K]``."""
        return self.quantized_weight().dequantize(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        if self._held:  # `torch.nn.utils.parametrize` computes the table
            return F.embedding(ids, self.weight)
        return read(self, "weight", self.scheme, ids).dequantize(self._row_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._row_dtype is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._row_dtype = fn(torch.empty(0, dtype=self._row_dtype)).dtype
        unchanged = [(parameter, parameter.data) for parameter in self.parameters() if parameter.is_floating_point()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter, tensor in unchanged:  # scales in two levels keep their types
            parameter.data = tensor.to(parameter.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}"
