"""GPTQ: accurate post-training quantization for generative pre-trained transformers (arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.core.k_quants import COLUMNS
from hf_quant.core.layout import scale_dtype
from hf_quant.core.numerics import dequantize, quantize
from hf_quant.core.rounding import search
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.core.two_levels import Base, base_of
from hf_quant.errors import HfQuantError
from hf_quant.methods._descent import descend
from hf_quant.methods._nearest import best, better, judged
from hf_quant.methods._outliers import outlier_index, outlier_mask

BLOCK = 128  # columns whose errors are passed to later ones in one product: affects speed, not the result


@dataclass(frozen=True)
class GPTQ:
    """Quantizes one column after the other, and passes the error of each on to the columns that follow.

    Groups are taken as a whole, the one with the strongest inputs first, and within a group the columns likewise: the order of
    activations, but with contiguous groups, so that nothing is permuted at run time. The scale and zero point of a group are
    searched when its first column is quantized, after all earlier updates, with the squared error of each column weighted by the
    remaining Hessian. Rows with more error than rounding to nearest (such as constant rows, whose codes cannot compensate) are
    rounded to nearest, and so are layers with more error on held-out rows.

    In K-quants, what the scales of a block are multiples of is chosen when its first column is quantized; blocks are taken as
    groups of groups.

    Args:
        sweeps: Passes of coordinate descent over scales and codes afterwards.
        steps: Ranges tried for each group, from the full one down to ``least`` of it.
        least: Smallest share of the range tried.
    """

    calibrated: ClassVar[bool] = True
    two_levels: ClassVar[bool] = True
    sweeps: int = 0
    steps: int = 20
    least: float = 0.6

    def quantize(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, stats: InputStats | None = None
    ) -> QuantizedTensor:
        if stats is None:
            raise HfQuantError("gptq needs calibration data; rtn needs none")
        if not stats.gram.isfinite().all():
            raise HfQuantError("NaN or infinite values among the inputs")
        quantized = self._compensated(weight, scheme, dtype, stats)
        columns = None
        if quantized.outliers is not None and scheme.outlier_columns:
            columns = quantized.outliers.index.long()
        others = best(weight, scheme, scale_dtype(scheme, dtype), self.steps, self.least, stats, columns)
        return better(judged(weight, stats, quantized), others).quantized

    def _compensated(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, stats: InputStats
    ) -> QuantizedTensor:
        """Column after column, each making up for the errors of those before it."""
        dtype = scale_dtype(scheme, dtype)
        codes, scale, zero, base, values = self._solution(weight, scheme, dtype, stats)
        if self.sweeps:
            H = stats.scaled_gram()
            descend(weight.float().T, codes, scale, zero, H, scheme, dtype, self.sweeps, values, Base(*base))
        outliers = columns = None
        if values is not None:
            columns = values[0].sum(1).nonzero().flatten() if scheme.outlier_columns else None
            where = values[0].T.nonzero()[:, 1].view(len(weight), -1) if columns is None else columns
            outliers = Outliers.gather(values[1].T, where, dtype)
        return QuantizedTensor.from_codes(
            codes.T.to(torch.uint8), scale.T.to(dtype).contiguous(), zero.T.contiguous(), scheme, outliers
        )

    def _solution(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, stats: InputStats
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """What `_greedy` gives, with columns in their own order, and the outliers: their mask and values, ``[K, N]``."""
        k = weight.shape[1]
        G = scheme.groups(k)
        order = self._order(stats.gram.diagonal(), G, k // COLUMNS if scheme.blocks else None)
        U = self._factor(order, stats)
        importance = (
            U.diagonal().square().reciprocal()
        )  # of the error of each column, after later ones have compensated for it
        W = weight.float().T[order]  # [K, N], a copy
        index = outlier_index(W.T, scheme, dtype, importance, self.steps, self.least, stats.importance[order])
        free = None if index is None else outlier_mask(index, weight.shape).T
        codes, scale, zero, base = self._greedy(W, U, importance, scheme, dtype, free)
        back = torch.empty_like(order)
        back[order] = torch.arange(k, device=order.device)
        groups = order[:: k // G].argsort()
        values = None if free is None else (free[back], W[back])
        return codes[back], scale[groups], zero[groups], base[:, groups], values

    def _greedy(
        self, W: Tensor, U: Tensor, importance: Tensor, scheme: QuantScheme, dtype: torch.dtype, free: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Algorithm 1 of the paper, on columns in the chosen order.

        Args:
            W: float32 ``[K, N]``, changed in place; afterwards it has the values of the outliers.
            U: float32 ``[K, K]``, the upper Cholesky factor of the inverse of the damped Hessian.
            importance: float32 ``[K]``, weight of the squared error of each column in the search for a grid.
            scheme: Scheme of the codes.
            dtype: The dtype of stored scales.
            free: bool ``[K, N]``, mask of the outliers; None without outliers.

        Returns:
            Codes ``[K, N]``, scales and zero points ``[G, N]``, and for K-quants their bases ``[2, G, N]``; all float32.
        """
        k, n = W.shape
        G = scheme.groups(k)
        size = k // G
        codes, scale, zero, bases = torch.empty_like(W), W.new_empty(G, n), W.new_empty(G, n), W.new_zeros(2, G, n)
        base = None
        for start, stop in _blocks(k, size):
            g = start // size
            if scheme.k_quant is not None and start % COLUMNS == 0:
                block = slice(start, start + COLUMNS)
                parts = (W[block].T.unflatten(1, (-1, size)), scheme.k_quant, self.steps, self.least)
                base = base_of(*parts, importance[block].view(-1, size))
            if start % size == 0:
                group = W[start : start + size]
                group = group if free is None else group.masked_fill(free[start : start + size], 0)
                one = None if base is None else Base(base.d.flatten(1), base.dmin.flatten(1))
                s, z = search(group.T, scheme, dtype, self.steps, self.least, importance[start : start + size], one)
                scale[g], zero[g] = s.squeeze(1), z.squeeze(1)
                if one is not None:
                    bases[0, g], bases[1, g] = one.d.squeeze(1), one.dmin.squeeze(1)
            errors = W.new_empty(stop - start, n)
            for at in range(start, stop):
                codes[at] = quantize(W[at], scale[g], zero[g], scheme)
                real = dequantize(codes[at], scale[g], zero[g])
                if free is not None:
                    codes[at] = torch.where(free[at], zero[g], codes[at])
                    real = torch.where(free[at], W[at], real)
                errors[at - start] = (W[at] - real) / U[at, at]
                W[at + 1 : stop].addr_(U[at, at + 1 : stop], errors[at - start], alpha=-1)
            W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
        return codes, scale, zero, bases

    def _order(self, diagonal: Tensor, groups: int, blocks: int | None = None) -> Tensor:
        """The columns in the order they are quantized, int64 ``[K]``: blocks, their groups, and the columns of each."""
        blocks = blocks or groups
        strength = diagonal.view(blocks, groups // blocks, -1)
        columns = torch.arange(diagonal.numel(), device=diagonal.device).view_as(strength)
        columns = columns.gather(2, strength.argsort(dim=2, descending=True, stable=True))
        second = strength.sum(2).argsort(dim=1, descending=True, stable=True)
        columns = columns.gather(1, second[..., None].expand_as(columns))
        return columns[strength.sum((1, 2)).argsort(descending=True, stable=True)].flatten()

    def _factor(self, order: Tensor, stats: InputStats) -> Tensor:
        """Upper Cholesky factor of the inverse of the damped Hessian, float32 ``[K, K]``; the identity if there is none."""
        upper = stats.upper(order)
        if upper is not None:
            return upper
        stats.notes.append("no usable Hessian: rounded to nearest")
        return torch.eye(len(order), dtype=torch.float32, device=order.device)


def _blocks(k: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `BLOCK` columns, each within a group of ``size`` columns."""
    for group in range(0, k, size):
        for start in range(group, group + size, BLOCK):
            yield start, min(start + BLOCK, group + size)


METHOD = GPTQ
