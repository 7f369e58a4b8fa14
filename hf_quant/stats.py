"""What calibration learns about the inputs of one linear layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class InputStats:
    """Running statistics of the rows ``[K]`` that enter a layer.

    The Gram matrix is summed in float64: in float32 the order of the batches alone changes codes
    (154 of 262,144 in one ill-conditioned case), in float64 it does not.

    Attributes:
        gram: float64 ``[K, K]``, the sum of ``x x^T`` over all rows.
        rows: How many there were.
        notes: What a method wants reported about this layer.
    """

    gram: Tensor
    rows: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> InputStats:
        """Of a layer that has seen nothing."""
        return cls(torch.zeros(in_features, in_features, dtype=torch.float64, device=device))

    def update(self, x: Tensor) -> None:
        """Fold in activations ``[..., K]``."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float64)
        self.gram.addmm_(rows.T, rows)
        self.rows += rows.shape[0]

    @property
    def hessian(self) -> Tensor:
        """float64 ``[K, K]``, the mean of ``2 x x^T``: of the squared output error of any row of weights."""
        return self.gram * (2 / max(1, self.rows))

    @property
    def importance(self) -> Tensor:
        """float32 ``[K]``, the mean square of each input over the mean of all; ones where nothing was seen."""
        diagonal = self.gram.diagonal()
        mean = diagonal.mean()
        return (diagonal / mean).float() if mean > 0 else torch.ones_like(diagonal, dtype=torch.float32)

    def error(self, original: Tensor, quantized: Tensor) -> float:
        """Squared error of the layer's output over the squared output, on the rows seen.

        Args:
            original: ``[N, K]``.
            quantized: ``[N, K]``.
        """
        w = original.double()
        difference = w - quantized.double()
        lost = ((difference @ self.gram) * difference).sum()
        whole = ((w @ self.gram) * w).sum()
        return float(lost / whole) if whole > 0 else 0.0
