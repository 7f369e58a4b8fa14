"""Sums over inputs, and the errors that are weighed with them, beside plain formulas in float64."""

import pytest
import torch

from hf_quant.core.stats import TOGETHER, WIDE, InputStats, quadratic

WIDTHS = [1, WIDE - 1, WIDE, 576, 960]


def inputs(rows: int, k: int) -> torch.Tensor:
    x = torch.randn(rows, k) + 1
    x[:, k // 2] *= 300  # an outlier channel
    return x


@pytest.mark.parametrize("k", WIDTHS)
def test_the_errors_of_rows(k: int) -> None:
    x, rows = inputs(3 * k + 5, k).double(), torch.randn(7, k, dtype=torch.float64)
    torch.testing.assert_close(quadratic(rows, x.T @ x), (rows @ x.T).square().sum(1))


@pytest.mark.parametrize("k", [5, 576])
def test_inputs_are_summed_in_parts(k: int) -> None:
    x, original = inputs(TOGETHER + 300, k), inputs(TOGETHER + 300, k)
    stats = InputStats.empty(k, drift=True)
    stats.update(x, original)
    stats.update(x[:20], original[:20])
    seen, true = (torch.cat([t, t[:20]]).double() for t in (x, original))
    torch.testing.assert_close(stats.gram, seen.T @ seen)
    assert stats.rows == stats.drift_rows == len(seen)
    assert stats.drift is not None
    off = stats.drift - (true - seen).T @ seen
    assert (off.abs() <= 1e-5 * (true - seen).abs().T @ seen.abs()).all()


@pytest.mark.parametrize("k", [64, 576])
def test_the_error_of_a_layer_whose_errors_make_up_for_one_another(k: int) -> None:
    """What is left of them is a millionth of what float32 would sum."""
    x = torch.randn(2 * k, k) + 300
    stats = InputStats.empty(k)
    stats.update(x)
    W, off = torch.randn(9, k, dtype=torch.float64), torch.randn(9, k, dtype=torch.float64)
    off -= off.mean(1, keepdim=True)
    lost, output = ((rows @ x.double().T).square().sum() for rows in (off, W))
    assert stats.error(W, W + off) == pytest.approx(float(lost / output), rel=1e-5)


def test_the_factor_is_the_same_with_and_without_an_inverse_at_hand() -> None:
    stats, order = InputStats.empty(96), torch.randperm(96)
    stats.update(inputs(300, 96))
    alone = stats.upper(order)
    stats.forget()
    assert stats.inverse() is not None
    again = stats.upper(order)
    assert alone is not None and again is not None
    torch.testing.assert_close(again, alone)
    H = stats.gram[order][:, order] * (2 / stats.rows)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    torch.testing.assert_close(
        (alone.double().T @ alone.double()) @ H, torch.eye(96, dtype=torch.float64), atol=1e-3, rtol=0
    )


def test_held_out_errors_are_those_of_rows() -> None:
    stats, W, Q = InputStats.empty(48), torch.randn(6, 48), torch.randn(6, 48)
    x = inputs(64, 48)
    stats.update(x, held=1)
    stats.update(x[:8], held=1)
    every = torch.cat([x, x[:8]]).double()
    torch.testing.assert_close(
        stats.held_errors(W, Q), (every @ (Q - W).double().T).square().sum(0), rtol=1e-4, atol=0
    )
