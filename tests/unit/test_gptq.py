import pytest
import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import HfQuantError
from hf_quant.methods import method


def calibrated(k: int, rows: int = 510, seed: int = 0) -> tuple[Tensor, InputStats]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=draw) @ torch.randn(k, k, generator=draw)  # correlated columns
    stats = InputStats.empty(k)
    stats.update(x[: rows // 3])
    stats.update(x[rows // 3 :].view(2, -1, k))
    return x, stats


def test_statistics() -> None:
    x, stats = calibrated(32)
    wide = x.double()
    torch.testing.assert_close(stats.hessian, 2 * wide.T @ wide / len(x))
    torch.testing.assert_close(stats.importance, (wide.square().mean(0) / wide.square().mean()).float())
    w, q = torch.randn(8, 32), torch.randn(8, 32)
    expected = (wide @ (w - q).double().T).square().sum() / (wide @ w.double().T).square().sum()
    assert stats.error(w, q) == pytest.approx(expected.item())
    nothing, (w, q) = InputStats.empty(8), (w[:, :8], q[:, :8])
    assert nothing.error(w, q) == pytest.approx(float((w - q).square().sum() / w.square().sum()))
    assert (nothing.importance == 1).all()


def plain_gptq(W: Tensor, H: Tensor, scheme: QuantScheme, order: Tensor, spared: Tensor | None = None) -> Tensor:
    """The paper's greedy step in float64: after each column the optimal update of all that are left, from a fresh inverse.

    Outliers, where ``spared [N, K]`` is true, take what their weight has become.
    """
    W, k = W.double().clone(), W.shape[1]
    H = H + 0.01 * H.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    size, made = k // scheme.groups(k), torch.zeros_like(W)
    free = torch.zeros_like(W, dtype=torch.bool) if spared is None else spared
    for i, j in enumerate(order.tolist()):
        left = order[i:]
        inverse = torch.linalg.inv(H[left][:, left])
        if i % size == 0:
            columns = order[i : i + size]
            group = W[:, columns].masked_fill(free[:, columns], 0)
            low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            scale = torch.maximum(high, -low) * 2 / scheme.qmax if scheme.symmetric else (high - low) / scheme.qmax
            scale = scale.float().double()
            zero = (
                torch.full_like(scale, scheme.zero)
                if scheme.symmetric
                else (-low / scale).round().clamp(0, scheme.qmax)
            )
        q = ((W[:, j] / scale).round() + zero).clamp(0, scheme.qmax)
        made[:, j] = torch.where(free[:, j], W[:, j], (q - zero) * scale)
        W[:, left] -= ((W[:, j] - made[:, j]) / inverse[0, 0])[:, None] * inverse[0][None]
    return made


@pytest.mark.parametrize("outliers", [0.0, 0.05])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "k"), [(16, 64), (32, 160), (-1, 64), (-1, 160)])
def test_it_is_the_papers_update(group_size: int, k: int, symmetric: bool, outliers: float) -> None:
    _, stats = calibrated(k)
    W, scheme = torch.randn(8, k), QuantScheme(4, group_size, symmetric, outliers=outliers)
    solver = method("gptq", steps=0)
    order = solver._order(stats.hessian.diagonal(), scheme.groups(k))  # type: ignore[attr-defined]
    made = solver.quantize(W, scheme, torch.float32, stats)
    spared = None
    if made.outliers is not None:
        spared = torch.zeros(W.shape, dtype=torch.bool).scatter_(1, made.outliers.index.long(), True)
    expected = plain_gptq(W, stats.hessian, scheme, order, spared)
    same = ((made.dequantize(torch.float64) - expected).abs() < 1e-4).all(1)
    assert int(same.sum()) >= 6  # float rounding may flip a tie, and all later columns of the row with it


def test_the_order() -> None:
    solver = method("gptq")
    diagonal = torch.tensor([1.0, 2, 9, 8, 3, 4])
    assert solver._order(diagonal, 3).tolist() == [2, 3, 5, 4, 1, 0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_beats_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    """On its own inputs and on others of the same kind; rounding with importance is between the two."""
    _, stats = calibrated(64, 1020)
    scheme = QuantScheme(bits, 32, symmetric)
    fresh = InputStats.empty(64)
    fresh.update(calibrated(64, 1020)[0] + 0.01 * torch.randn(1020, 64))
    W = torch.randn(32, 64)

    def error(name: str, own: InputStats | None, judge: InputStats) -> float:
        return judge.error(W, method(name).quantize(W, scheme, torch.float32, own).dequantize())

    for judge in (stats, fresh):
        assert error("gptq", stats, judge) < 0.7 * error("rtn", None, judge)


def test_importance_helps_rounding() -> None:
    x = torch.randn(256, 64) * torch.logspace(-1, 1, 64)[torch.randperm(64)]
    stats = InputStats.empty(64)
    stats.update(x)
    W, scheme = torch.randn(32, 64), QuantScheme(3, 32)
    plain, weighed = (
        stats.error(W, method("rtn").quantize(W, scheme, torch.float32, s).dequantize()) for s in (None, stats)
    )
    assert weighed < 0.95 * plain


@pytest.mark.parametrize("name", ["rtn", "gptq", "hqq"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_codes_do_not_depend_on_the_default_dtype(name: str, default: torch.dtype) -> None:
    """Scripts that call `torch.set_default_dtype` got other codes, or an error."""
    scheme = QuantScheme.parse("W3A16-g32")
    weight, stats = calibrated(64)
    expected = [method(name).quantize(weight, scheme, torch.float32, s) for s in (stats, InputStats.empty(64))]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        again = InputStats.empty(64)
        given = [method(name).quantize(weight, scheme, torch.float32, s) for s in (stats, again)]
    finally:
        torch.set_default_dtype(before)
    assert all(map(same, given, expected)) and again.peak.dtype == torch.float32


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return torch.equal(a.qweight, b.qweight) and torch.equal(a.scale, b.scale)


def test_batches_in_another_order_give_the_same_codes() -> None:
    x, stats = calibrated(64)
    other = InputStats.empty(64)
    for part in x.flip(0).split(50):
        other.update(part)
    W, scheme = torch.randn(32, 64), QuantScheme(4, 32)
    one, two = (method("gptq").quantize(W, scheme, torch.float32, s) for s in (stats, other))
    assert torch.equal(one.qweight, two.qweight) and torch.equal(one.scale, two.scale)


def test_difficult_hessians() -> None:
    W, scheme = torch.randn(8, 64), QuantScheme(4, 32)
    nearest = method("rtn").quantize(W, scheme, torch.float32)
    nothing = InputStats.empty(64)
    assert torch.equal(method("gptq").quantize(W, scheme, torch.float32, nothing).qweight, nearest.qweight)
    assert nothing.notes == ["no usable Hessian: rounded to nearest"]
    single = InputStats.empty(64)
    single.update(torch.randn(1, 64))  # rank one
    assert method("gptq").quantize(W, scheme, torch.float32, single).dequantize().isfinite().all()
    dead = InputStats.empty(64)
    dead.update(torch.randn(256, 64) * (torch.arange(64) % 3 > 0))
    assert method("gptq").quantize(W, scheme, torch.float32, dead).dequantize().isfinite().all() and not dead.notes
    indefinite = InputStats(torch.eye(64, dtype=torch.float64).index_fill_(0, torch.tensor([3]), 0), 1)
    indefinite.gram[3, 3] = -0.05
    method("gptq").quantize(W, scheme, torch.float32, indefinite)
    assert indefinite.notes == ["damped by 0.1 of the mean: 0.01 was too little"]
    broken = InputStats.empty(64)
    broken.update(torch.full((1, 64), torch.nan))
    with pytest.raises(HfQuantError, match="NaN or infinite values among the inputs"):
        method("gptq").quantize(W, scheme, torch.float32, broken)
    with pytest.raises(HfQuantError, match="needs calibration"):
        method("gptq").quantize(W, scheme, torch.float32)


@pytest.mark.parametrize("name", ["gptq", "hqq", "rtn"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_no_row_loses_more_than_rounding(bits: int, symmetric: bool, name: str) -> None:
    """Constant rows and rows far from zero leave GPTQ no code to make up with: it lost twice as much there."""
    _, stats = calibrated(64)
    W = torch.randn(8, 64) * 0.05
    W[1], W[2], W[3:5] = 0.37, -0.37, W[3:5] + 1
    W[5] = W[5].abs() + 100
    scheme = QuantScheme(bits, 32, symmetric)
    made = method(name).quantize(W, scheme, torch.float32, stats).dequantize()
    for plain in (method("rtn", steps=0), method("rtn")):
        least = stats.row_errors(W, plain.quantize(W, scheme, torch.float32).dequantize())
        if plain == method("rtn"):
            assert (stats.row_errors(W, made) <= least * 1.001 + 1e-9).all()
        assert stats.row_errors(W, made).sum() <= least.sum() * 1.001


def test_a_layer_that_loses_on_rows_held_out_is_rounded() -> None:
    """Few rows without structure: GPTQ fits them, and loses twice as much as rounding on all others."""
    torch.manual_seed(0)
    W, scheme = torch.randn(16, 128), QuantScheme(4, 32)
    x, fresh = torch.randn(128, 128), InputStats.empty(128)
    fresh.update(torch.randn(2000, 128))
    errors = {}
    for held in (0, 4):
        stats = InputStats.empty(128)
        stats.update(x, held=held)
        assert (
            stats.seen == 128
            and stats.rows == (96 if held else 128)
            and sum(len(r) for r, _ in stats.held) == 128 - stats.rows
        )
        errors[held] = fresh.error(W, method("gptq").quantize(W, scheme, torch.float32, stats).dequantize())
    plain = fresh.error(W, method("rtn").quantize(W, scheme, torch.float32).dequantize())
    assert errors[0] > 1.5 * plain and errors[4] < 1.05 * plain


def test_rows_are_held_out_evenly() -> None:
    stats = InputStats.empty(4)
    for count in (1, 2, 7, 0, 30):
        stats.update(torch.randn(count, 4), held=8)
    assert stats.seen == 40 and stats.rows == 35 and sum(len(x) for x, _ in stats.held) == 5
