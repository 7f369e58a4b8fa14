"""An embedding table with quantized rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.nn._hooks import mark_initialized
from hf_quant.nn._outside import Outside, seen
from hf_quant.nn._weight import frozen, read, register


class QuantEmbedding(Outside, nn.Embedding):
    """Drop-in for ``nn.Embedding(V, K)``: only the rows looked up are dequantized.

    Args:
        num_embeddings: V.
        embedding_dim: K, a multiple of 32.
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
        if not quantized:
            self.weight = frozen(torch.empty(num_embeddings, embedding_dim, dtype=dtype))
        register(self, "weight", (num_embeddings, embedding_dim), scheme, dtype, codes=quantized)
        mark_initialized(self)

    @property
    def compute_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of returned rows."""
        return self.weight_scale.dtype

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
        return read(self, "weight", self.scheme, ids).dequantize()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}"
