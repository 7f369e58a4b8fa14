"""Statistics of the inputs of one linear layer, collected by calibration."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_ROWS = 512  # rows on which the error of rounded activations is measured
HELD_ROWS = 2048  # held-out rows, enough to compare two candidates
TOGETHER = 512  # rows of inputs that are in float64 at the same time
TILE = 128  # columns of the Gram matrix computed together
WIDE = 256  # columns of a square matrix that rows are multiplied by together
ROWS = 256  # weight rows processed together
PART = 4096  # rows whose drift is summed in float32
DAMP = 0.01  # added to the Hessian's diagonal before inversion, as a share of its mean
RISES = (1, 10, 100)  # multiples of the damping to try until the factorization succeeds


@dataclass(slots=True)
class InputStats:
    """Running statistics of the inputs ``x [K]`` of a layer, and of its inputs in the float model.

    The Gram matrix is summed in float64. In float32, the order of batches alone would change codes (154 of 262,144 in an
    ill-conditioned case).

    Attributes:
        gram: float64 ``[K, K]``, sum of ``x x^T`` over all rows that are not held out.
        rows: Number of these rows.
        drift: float64 ``[K, K]``, sum of ``(x_float - x) x^T``; None if the float model is not followed.
        drift_rows: Number of rows in that sum.
        held: Held-out rows, which are in neither sum: pairs of ``x`` and ``x_float - x``, ``[n, K]`` each; the latter is empty,
            ``[0, K]``, if the float model is not followed.
        notes: Remarks of a method about this layer.
        peak: float32 ``[K]``, the largest magnitude of each input.
        sample: Some rows, ``[n, K]`` each, if activations will be rounded.
    """

    gram: Tensor
    rows: int = 0
    drift: Tensor | None = None
    drift_rows: int = 0
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    peak: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32))
    sample: list[Tensor] = field(default_factory=list)
    _inverse: Tensor | None = None
    _upper: tuple[Tensor, Tensor] | None = None
    _padded: InputStats | None = None

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu", *, drift: bool = False) -> InputStats:
        """Statistics without any rows; ``drift`` if the inputs of the float model will be passed too."""
        gram = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        peak = torch.zeros(in_features, dtype=torch.float32, device=device)
        return cls(gram, drift=torch.zeros_like(gram) if drift else None, peak=peak)

    def update(self, x: Tensor, original: Tensor | None = None, *, held: int = 0, sampled: int = 0) -> None:
        """Add activations ``[..., K]``.

        Args:
            x: Inputs of the layer.
            original: Inputs of the layer in the float model, for the same tokens.
            held: The last of every ``held`` rows is held out, and the others, its neighbours, are not added to the drift. 0 for
                none.
            sampled: The first of every ``sampled`` rows is added to ``sample``; 0 for none.
        """
        rows = x.reshape(-1, x.shape[-1])
        if len(rows):
            self.peak = torch.maximum(self.peak, rows.abs().amax(0).float())
        if sampled:
            self.sample.append(rows[::sampled].float())
        off = rows[:0] if original is None or self.drift is None else original.reshape(rows.shape) - rows
        held_rows = self._kept_out(len(rows), held)
        if len(held_rows):
            self.held.append((rows[held_rows], off[held_rows] if len(off) else off))
        if self.drift is not None and not held:
            for before, part in zip(off.float().split(PART), rows.float().split(PART), strict=True):
                for columns, into in zip(before.split(WIDE, dim=1), self.drift.split(WIDE), strict=True):
                    into.add_(columns.T @ part)
            self.drift_rows += off.shape[0]
        added = _without(rows, held_rows)
        for wide in map(torch.Tensor.double, added.split(TOGETHER)):
            for i in range(0, wide.shape[1], TILE):  # only one triangle of the symmetric matrix is computed
                self.gram[i:, i : i + TILE].addmm_(wide[:, i:].T, wide[:, i : i + TILE])
        for i in range(0, len(self.gram), TILE):
            self.gram[i : i + TILE, i + TILE :] = self.gram[i + TILE :, i : i + TILE].T
        self.rows += len(added)
        self.forget()

    def _kept_out(self, count: int, held: int) -> Tensor:
        """The numbers of those of the next ``count`` rows that are held out, int64."""
        first = -(self.seen + 1) % held if held else count
        return torch.arange(first, max(first, count), held or 1)

    @property
    def seen(self) -> int:
        """Number of rows so far, with held-out ones."""
        return self.rows + sum(len(x) for x, _ in self.held)

    @property
    def hessian(self) -> Tensor:
        """The mean of ``2 x x^T``, float64 ``[K, K]``: the Hessian of the squared output error of each row of weights."""
        return self.gram * (2 / max(1, self.rows))

    @property
    def importance(self) -> Tensor:
        """Mean square of each input over the mean of all, float32 ``[K]``; ones without rows."""
        diagonal = self.gram.diagonal()
        mean = diagonal.mean()
        return (diagonal / mean).float() if mean > 0 else torch.ones_like(diagonal, dtype=torch.float32)

    def inverse(self) -> Tensor | None:
        """The inverse of the damped Hessian, float64 ``[K, K]``; None if it is singular. More damping than usual is noted."""
        if self._inverse is None:
            self._inverse = self._inverted(None)
        return self._inverse

    def upper(self, order: Tensor) -> Tensor | None:
        """Upper Cholesky factor of that inverse, with rows and columns in ``order``, float32 ``[K, K]``; None if it is singular.

        It is cached for other layers with this input, in place of the inverse, which is as large again.
        """
        if self._upper is None or not torch.equal(self._upper[0], order):
            inverse = self._inverted(order) if self._inverse is None else self._inverse[order[:, None], order].T
            self._inverse = None
            if inverse is None or _factored(inverse, upper=True):
                return None
            self._upper = order, inverse.float()
        return self._upper[1]

    def _inverted(self, order: Tensor | None) -> Tensor | None:
        """The inverse of the damped Hessian, with rows and columns in ``order``, stored column by column for LAPACK."""
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
        """A target to round instead of ``weight``, with which the layer compensates for errors of earlier layers.

        On the inputs seen, ``weight + blend * W D H^-1`` comes closest to the output of ``weight`` on the float model's inputs; D is the
        drift. This is the idea of GPTAQ (arXiv:2504.02692) and Qronos (arXiv:2505.11695). The blend, 0 to 1, is the best one on
        held-out rows.

        Args:
            weight: ``[N, K]``.

        Returns:
            float32 ``[N, K]``, and the blend, which is 0 without drift or held-out rows.
        """
        held = [pair for pair in self.held if len(pair[1])]
        inverse = self.inverse() if self.drift is not None and self.drift_rows and held else None
        if self.drift is None or inverse is None:
            return weight.float(), 0.0
        step = _product(_product(weight.float(), self.drift), inverse).mul_(2 / self.drift_rows)
        fits, size = 0.0, 0.0
        for x, off in held:
            correction = x @ step.T
            fits += (correction * (off @ weight.T.to(off.dtype))).sum(dtype=torch.float64).item()
            size += correction.square().sum(dtype=torch.float64).item()
        blend = min(1.0, max(0.0, fits / size)) if size > 0 else 0.0
        return step.mul_(blend).add_(weight), blend

    def padded(self, columns: int) -> InputStats:
        """Those of the same inputs with that many zeros behind, for layers that store zero columns; notes are shared."""
        if self._padded is None:
            square, row = (0, columns, 0, columns), (0, columns)
            self._padded = InputStats(
                F.pad(self.gram, square), self.rows, None if self.drift is None else F.pad(self.drift, square),
                self.drift_rows, [(F.pad(x, row), F.pad(off, row)) for x, off in self.held], self.notes,
                F.pad(self.peak, row), [F.pad(x, row) for x in self.sample],
            )  # fmt: skip
        return self._padded

    def forget(self) -> None:
        """Drop cached results after the sums have changed."""
        self._inverse = self._upper = self._padded = None

    def error(self, original: Tensor, quantized: Tensor) -> float:
        """Squared error of the layer's output over the squared output.

        Computed on the rows seen; without rows, for independent inputs of equal size, which gives the error of the weights.

        Args:
            original: ``[N, K]``.
            quantized: ``[N, K]``.
        """
        squared_error = squared_output = 0.0
        gram, mean = (self.scaled_gram(), float(self._mean())) if self.rows else (None, 1.0)
        for w, q in zip(original.split(ROWS), quantized.split(ROWS), strict=True):
            off = w.double() - q.double()
            if gram is None:
                errors, outputs = off.square_(), w.double().square_()
            else:  # the errors of GPTQ make up for one another: what is left of them is lost in float32
                errors, outputs = quadratic(off, self.gram), quadratic(w.float(), gram)
            squared_error += float(errors.sum()) / mean
            squared_output += float(outputs.sum(dtype=torch.float64))
        return squared_error / squared_output if squared_output > 0 else 0.0

    def scaled_gram(self) -> Tensor:
        """The Gram matrix of the inputs over the mean of its diagonal, float32 ``[K, K]``; it is float64 itself, and as large again."""
        mean = self._mean()
        scaled = torch.empty_like(self.gram, dtype=torch.float32)
        for part, rows in zip(scaled.split(ROWS), self.gram.split(ROWS), strict=True):
            part.copy_(rows / mean)
        return scaled

    def _mean(self) -> Tensor:
        """Of the diagonal, and above zero."""
        return self.gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)

    def row_errors(self, original: Tensor, quantized: Tensor) -> Tensor:
        """Squared error of each row's output on the rows seen, up to a common factor: float32 ``[N]``.

        Args:
            original: ``[N, K]``.
            quantized: ``[N, K]``.
        """
        gram = self.scaled_gram()
        parts = zip(original.split(ROWS), quantized.split(ROWS), strict=True)
        differences = (after.float() - before.float() for before, after in parts)
        return torch.cat([quadratic(off, gram) for off in differences])

    def held_errors(self, original: Tensor, quantized: Tensor) -> Tensor:
        """Squared error of each row's output on held-out rows: float64 ``[N]``, zeros without any.

        Args:
            original: ``[N, K]``.
            quantized: ``[N, K]``.
        """
        off = (quantized.float() - original.float()).T
        total = torch.zeros(len(original), dtype=torch.float64, device=original.device)
        for x, _ in self.held:
            total += (x.float() @ off).square_().sum(0, dtype=torch.float64)
        return total


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix``, which is square, in the dtype of ``rows``, without a copy of the whole matrix in it."""
    product = torch.empty_like(rows)
    for into, part in zip(product.split(WIDE, dim=1), matrix.split(WIDE, dim=1), strict=True):
        torch.mm(rows, part.to(rows.dtype), out=into)
    return product


def quadratic(rows: Tensor, gram: Tensor) -> Tensor:
    """``r gram r^T`` of each row ``r``: ``[N]``; of a symmetric matrix one half is multiplied.

    Args:
        rows: ``[N, K]``.
        gram: ``[K, K]``, symmetric, of the same dtype.
    """
    total = rows.new_zeros(len(rows))
    for start in range(0, len(gram), WIDE):
        stop = min(start + WIDE, len(gram))
        part = rows[:, start:stop]
        product = part @ gram[start:stop, start:stop]
        product.addmm_(rows[:, stop:], gram[stop:, start:stop], alpha=2)
        total += product.mul_(part).sum(1)
    return total


def _without(rows: Tensor, numbers: Tensor) -> Tensor:
    """``rows`` without those whose numbers are given."""
    stays = torch.ones(len(rows), dtype=torch.bool)
    stays[numbers] = False
    return rows[stays.to(rows.device)] if len(numbers) else rows


def _factored(matrix: Tensor, *, upper: bool) -> bool:
    """Replace a symmetric matrix, stored column by column, by its Cholesky factor; returns whether that failed."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, failed))
    return bool(failed)
