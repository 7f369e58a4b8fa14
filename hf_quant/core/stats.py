"""What calibration learns about the inputs of one linear layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SAMPLE_ROWS = 512  # looked at to see what rounding activations costs
HELD_ROWS = 2048  # of the inputs kept to judge on: enough for one number
TILE = 128  # columns of the Gram matrix computed together
ROWS = 256  # of weights looked at together in float64
PART = 4096  # rows whose drift is summed in float32
DAMP = 0.01  # share of the mean of the Hessian's diagonal added to it before it is inverted
RISES = (1, 10, 100)  # times the damping, tried until the factorization succeeds


@dataclass(slots=True)
class InputStats:
    """Running statistics of the rows ``x [K]`` that enter a layer, and of those that would, were nothing quantized.

    The Gram matrix is summed in float64: in float32 the order of the batches alone changes codes
    (154 of 262,144 in one ill-conditioned case), in float64 it does not.

    Attributes:
        gram: float64 ``[K, K]``, the sum of ``x x^T`` over all rows that were not held out.
        rows: How many those were.
        drift: float64 ``[K, K]``, the sum of ``(x_float - x) x^T``; None where the float model was not looked at.
        drift_rows: Over how many rows.
        held: Rows that are in neither sum, to judge on: pairs of ``x`` and ``x_float - x``, ``[n, K]`` each; the latter is
            empty, ``[0, K]``, where the float model was not looked at.
        notes: What a method wants reported about this layer.
        peak: float32 ``[K]``, the largest magnitude of each input.
        sample: Some of the rows, ``[n, K]`` each, where activations shall be rounded.
    """

    gram: Tensor
    rows: int = 0
    drift: Tensor | None = None
    drift_rows: int = 0
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    peak: Tensor = field(default_factory=lambda: torch.zeros(()))
    sample: list[Tensor] = field(default_factory=list)
    _inverse: Tensor | None = None
    _upper: tuple[Tensor, Tensor] | None = None

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu", *, drift: bool = False) -> InputStats:
        """Of a layer that has seen nothing; ``drift``: the float model's inputs will be there too."""
        gram = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        peak = torch.zeros(in_features, device=device)
        return cls(gram, drift=torch.zeros_like(gram) if drift else None, peak=peak)

    def update(self, x: Tensor, original: Tensor | None = None, *, held: int = 0, sampled: int = 0) -> None:
        """Fold in activations ``[..., K]``.

        Args:
            x: What the layer is given.
            original: What the layer of the float model is given for the same tokens.
            held: Of every ``held`` rows seen so far, the last is kept to judge on and enters no sum; the drift of the others,
                which are its neighbours, is not summed up either. 0 for none.
            sampled: Of every ``sampled`` rows, the first is kept in ``sample``; 0 for none.
        """
        rows = x.reshape(-1, x.shape[-1])
        if len(rows):
            self.peak = torch.maximum(self.peak, rows.abs().amax(0).float())
        if sampled:
            self.sample.append(rows[::sampled].float())
        off = rows[:0] if original is None or self.drift is None else original.reshape(rows.shape) - rows
        kept = self._kept_out(len(rows), held)
        if len(kept):
            self.held.append((rows[kept], off[kept] if len(off) else off))
        if self.drift is not None and not held:
            for before, part in zip(off.float().split(PART), rows.float().split(PART), strict=True):
                self.drift += before.T @ part
            self.drift_rows += off.shape[0]
        wide = _without(rows, kept).to(torch.float64)
        for i in range(0, wide.shape[1], TILE):  # one half is the other, turned
            j = min(i + TILE, wide.shape[1])
            part = wide[:, i:].T @ wide[:, i:j]
            self.gram[i:, i:j] += part
            self.gram[i:j, j:] += part[j - i :].T
        self.rows += wide.shape[0]
        self.forget()

    def _kept_out(self, count: int, held: int) -> Tensor:
        """int64, the numbers of the next ``count`` rows that are held out."""
        first = -(self.seen + 1) % held if held else count
        return torch.arange(first, max(first, count), held or 1)

    @property
    def seen(self) -> int:
        """How many rows there were, those held out included."""
        return self.rows + sum(len(x) for x, _ in self.held)

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

    def inverse(self) -> Tensor | None:
        """float64 ``[K, K]``, of the damped Hessian; None if it cannot be inverted. Noted where it took more damping."""
        if self._inverse is None:
            self._inverse = self._inverted(None)
        return self._inverse

    def upper(self, order: Tensor) -> Tensor | None:
        """float32 ``[K, K]``: the upper Cholesky factor of that inverse with rows and columns in ``order``; None likewise.

        It is kept for the other layers with this input; one matrix of the size of the Gram matrix is all that is held besides.
        """
        if self._upper is None or not torch.equal(self._upper[0], order):
            inverse = self._inverted(order)
            if inverse is None or _factored(inverse, upper=True):
                return None
            self._upper = order, inverse.float()
        return self._upper[1]

    def _inverted(self, order: Tensor | None) -> Tensor | None:
        """The inverse of the damped Hessian, with rows and columns in ``order``; column by column, as LAPACK works."""
        diagonal = self.gram.diagonal() * (2 / max(1, self.rows))
        mean = diagonal.mean()
        for times in RISES if mean > 0 else ():
            H = self.gram.clone() if order is None else self.gram[order[:, None], order]
            H = H.mul_(2 / max(1, self.rows)).T
            H.diagonal().add_(DAMP * times * mean)
            if not _factored(H, upper=False):
                if times > 1:
                    self.notes.append(f"damped by {DAMP * times:g} of the mean: {DAMP:g} was too little")
                return torch.cholesky_inverse(H, out=H)
        return None

    def target(self, weight: Tensor) -> tuple[Tensor, float]:
        """What to round instead of ``weight``, so that the layer makes up for what was lost before it.

        On the inputs seen, ``weight + blend * W D H^-1`` comes closest to what ``weight`` gives on the float model's inputs,
        where D is the drift: the idea of GPTAQ (arXiv:2504.02692) and Qronos (arXiv:2505.11695). The blend, 0 to 1, is the
        best one on the rows that were held out.

        Args:
            weight: ``[N, K]``.

        Returns:
            float32 ``[N, K]``, and the blend, which is 0 where there is no drift or nothing to judge it on.
        """
        held = [pair for pair in self.held if len(pair[1])]
        inverse = self.inverse() if self.drift is not None and self.drift_rows and held else None
        if self.drift is None or inverse is None:
            return weight.float(), 0.0
        W = weight.double()
        step = W @ self.drift
        step = (step @ inverse).mul_(2 / self.drift_rows).float()
        fits, size = 0.0, 0.0
        for x, off in held:
            made = x @ step.T
            fits += (made * (off @ weight.T.to(off.dtype))).sum(dtype=torch.float64).item()
            size += made.square().sum(dtype=torch.float64).item()
        blend = min(1.0, max(0.0, fits / size)) if size > 0 else 0.0
        return step.mul_(blend).add_(weight), blend

    def forget(self) -> None:
        """Drop what was derived from the sums, after they were changed."""
        self._inverse = self._upper = None

    def error(self, original: Tensor, quantized: Tensor) -> float:
        """Squared error of the layer's output over the squared output.

        On the rows seen; where none was, as if inputs were independent and of one size: the error of the weights themselves.

        Args:
            original: ``[N, K]``.
            quantized: ``[N, K]``.
        """
        lost = whole = 0.0
        for w, q in zip(original.split(ROWS), quantized.split(ROWS), strict=True):
            wide = w.double()
            difference = wide - q.double()
            lost += float((self._weighed(difference) * difference).sum())
            whole += float((self._weighed(wide) * wide).sum())
        return lost / whole if whole > 0 else 0.0

    def _weighed(self, rows: Tensor) -> Tensor:
        return rows @ self.gram if self.rows else rows

    def row_errors(self, original: Tensor, quantized: Tensor) -> Tensor:
        """float32 ``[N]``: squared error of each row's output on the rows seen, in a unit of its own.

        Args:
            original: ``[N, K]``.
            quantized: ``[N, K]``.
        """
        gram = (self.gram / self.gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)).float()
        off = quantized.float() - original.float()
        return ((off @ gram) * off).sum(1)

    def held_error(self, original: Tensor, quantized: Tensor) -> float:
        """Squared error of the layer's output on the rows held out; 0 where there are none.

        Args:
            original: ``[N, K]``.
            quantized: ``[N, K]``.
        """
        off = (quantized.float() - original.float()).T
        return sum(float((x.float() @ off).square().sum(dtype=torch.float64)) for x, _ in self.held)


def _without(rows: Tensor, kept: Tensor) -> Tensor:
    """``rows`` but for those whose numbers are in ``kept``."""
    stays = torch.ones(len(rows), dtype=torch.bool)
    stays[kept] = False
    return rows[stays.to(rows.device)] if len(kept) else rows


def _factored(matrix: Tensor, *, upper: bool) -> bool:
    """Put the Cholesky factor of a symmetric matrix, stored column by column, in its place; whether that failed."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, failed))
    return bool(failed)
