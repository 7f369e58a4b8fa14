"""GPTQ: accurate post-training quantization for generative pre-trained transformers (arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import HfQuantError
from hf_quant.numerics import dequantize, quantize, search
from hf_quant.scheme import QuantScheme
from hf_quant.stats import InputStats
from hf_quant.tensor import QuantizedTensor

DAMPS = (1, 10, 100)  # times ``damp``, tried until the factorization succeeds


@dataclass(frozen=True)
class GPTQ:
    """Quantize columns one after the other; push the error of each into those still to come.

    Groups are taken whole, the one with the strongest inputs first, and so are the columns within each: the order of
    activations, with groups that stay contiguous, so that nothing has to be permuted at run time. A group's scale and zero
    point are searched when its turn comes, so they see every earlier update, with each column's squared error weighed by
    what is left of the Hessian.

    Args:
        damp: Share of the mean of ``diag(H)`` added to it before inversion.
        steps: Ranges tried per group, from the full one down to ``least`` of it.
        least: Smallest share of the range tried.
    """

    calibrated: ClassVar[bool] = True
    damp: float = 0.01
    steps: int = 20
    least: float = 0.6

    def quantize(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, stats: InputStats | None = None
    ) -> QuantizedTensor:
        if stats is None:
            raise HfQuantError("gptq needs calibration data; rtn needs none")
        if not stats.gram.isfinite().all():
            raise HfQuantError("NaN or infinite values among the inputs")
        n, k = weight.shape
        G = scheme.groups(k)
        size = k // G
        H = stats.hessian.to(weight.device)
        order = self._order(H.diagonal(), G)
        U = self._factor(H[order][:, order], stats)
        W = weight.float()[:, order]  # a copy
        importance = U.diagonal().square().reciprocal()  # of each column's error, given that later ones make up for it
        codes = torch.empty_like(W)
        scale, zero = W.new_empty(n, G), W.new_empty(n, G)
        for g in range(G):
            now = slice(g * size, (g + 1) * size)
            s, z = search(W[:, now], scheme, dtype, self.steps, self.least, importance[now])
            errors = W.new_empty(n, size)
            for j in range(size):
                at = g * size + j
                w = W[:, at : at + 1]
                q = codes[:, at : at + 1] = quantize(w, s, z, scheme.qmax)
                errors[:, j : j + 1] = (w - dequantize(q, s, z)) / U[at, at]
                W[:, at + 1 : now.stop].addmm_(errors[:, j : j + 1], U[at : at + 1, at + 1 : now.stop], alpha=-1)
            W[:, now.stop :].addmm_(errors, U[now, now.stop :], alpha=-1)
            place = int(order[now.start]) // size
            scale[:, place], zero[:, place] = s.squeeze(1), z.squeeze(1)
        back = torch.empty_like(codes, dtype=torch.uint8)
        back[:, order] = codes.to(torch.uint8)
        return QuantizedTensor.from_codes(back, scale.to(dtype), zero, scheme)

    def _order(self, diagonal: Tensor, groups: int) -> Tensor:
        """Columns in the order they are quantized: int64 ``[K]``."""
        by_group = diagonal.view(groups, -1)
        first = by_group.sum(1).argsort(descending=True, stable=True)
        inside = by_group.argsort(dim=1, descending=True, stable=True)[first]
        return (inside + first[:, None] * by_group.shape[1]).flatten()

    def _factor(self, H: Tensor, stats: InputStats) -> Tensor:
        """float32 ``[K, K]``: the upper Cholesky factor of the inverse of the damped Hessian; the identity if none works."""
        mean = H.diagonal().mean()
        if mean > 0:
            for times in DAMPS:
                damped = H + torch.eye(len(H), dtype=H.dtype, device=H.device) * (self.damp * times * mean)
                lower, failed = torch.linalg.cholesky_ex(damped)
                if not failed:
                    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not failed:
                    if times > 1:
                        stats.notes.append(
                            f"damped by {self.damp * times:g} of the mean: {self.damp:g} was too little"
                        )
                    return upper.float()
        stats.notes.append("no usable Hessian: rounded to nearest")
        return torch.eye(len(H), device=H.device)


METHOD = GPTQ
