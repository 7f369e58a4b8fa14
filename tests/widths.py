"""Every method, transform and format on awkward widths: the cases, and what has to hold in each.

`tests/contracts/test_widths.py` takes a fixed sample of them, `benchmarks/widths.py` all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from hf_quant import _plugins
from hf_quant.core.scheme import BITS, MULTIPLE, QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import format_named
from hf_quant.methods import method, quantize
from hf_quant.transforms import Stage, transform

WIDTHS = (10, 32, 96, 100, 160, 576, 588, 640, 896, 960, 1536, 2730, 4864)
ROWS = (1, 3, 33, 576)
OUTLIERS = ((0.0, False), (0.01, False), (0.01, True))
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One weight matrix ``[n, k]`` and its scheme."""

    k: int
    n: int
    scheme: QuantScheme

    @property
    def dtype(self) -> torch.dtype:
        """What scales are stored in: each type in a third of the cases."""
        return FLOATS[(self.n + self.scheme.bits + self.scheme.symmetric) % 3]

    def __str__(self) -> str:
        return f"{self.n}x{self.k}-{self.scheme}"


def cases(widths: tuple[int, ...] = WIDTHS, rows: tuple[int, ...] = ROWS) -> Iterator[Case]:
    """All of them, those with the same factorization of the Hessian one after the other."""
    for k in widths:
        columns = k + -k % MULTIPLE
        for size in (-1, *(1 << i for i in range(4, 13) if columns % (1 << i) == 0)):
            for n in rows:
                for bits in BITS:
                    for symmetric in (True, False):
                        for share, whole in OUTLIERS:
                            scheme = QuantScheme(bits, size, symmetric, outliers=share, outlier_columns=whole)
                            yield Case(k, n, scheme.fitted(k))


@lru_cache(maxsize=1)
def seen(k: int) -> InputStats:
    """Inputs with three outlier channels and one massive token, fewer rows than columns but for small widths."""
    draw = torch.Generator().manual_seed(k)
    x = (
        torch.randn(192, 24, generator=draw) @ torch.randn(24, k, generator=draw) / 5
        + torch.randn(192, k, generator=draw) / 5
    )
    x[:, [1, k // 2, k - 1]] *= 30
    x[0] *= 100
    stats = InputStats.empty(k, drift=True)
    stats.update(x[:128], x[:128] * 1.01)
    stats.update(x[128:], x[128:] * 1.01, held=4)
    return stats


@lru_cache(maxsize=8)
def weight(n: int, k: int) -> Tensor:
    """A few large weights, a constant row, and a row of zeros where there is more than one."""
    made = torch.distributions.StudentT(4.0).sample((n, k)) * 0.02
    made[:, k // 3] *= 10
    made[n // 2] = 0.03
    made[0] = 0 if n > 1 else made[0]
    return made


def check_method(name: str, case: Case) -> QuantizedTensor:
    """The result is well formed, and loses no more on the inputs seen than rounding to nearest."""
    W, stats, scheme = weight(case.n, case.k).to(case.dtype), seen(case.k), case.scheme
    made, plain = (quantize(method(each), W, scheme, case.dtype, s) for each, s in ((name, stats), ("rtn", None)))
    assert made.scheme == scheme and made.in_features == case.k
    assert made.scale.dtype == case.dtype and made.scale.shape == (case.n, scheme.groups(case.k))
    assert (made.scale > 0).all() and made.scale.isfinite().all() and int(made.codes().max()) <= scheme.qmax
    real = made.dequantize(torch.float32)
    assert real.isfinite().all()
    if scheme.outlier_columns:  # whose columns are chosen by inputs where some were seen
        return made
    lost, least = (stats.error(W, each.dequantize(torch.float32)) for each in (made, plain))
    assert lost <= least * 1.001 + 1e-9, f"{lost:.4g} instead of {least:.4g}"
    return made


def check_formats(tensor: QuantizedTensor) -> int:
    """Every format that holds such a tensor gives it back bit for bit; returns how many do."""
    held = 0
    for name in _plugins.names("formats"):
        made = format_named(name)
        if made.why_not(tensor.scheme) is not None:
            continue
        try:
            back = made.read(made.write(tensor), tensor.scheme)
        except FormatError as error:
            assert f"out_features {tensor.scale.shape[0]}" in str(error)
            continue
        held += 1
        assert torch.equal(back.qweight, tensor.qweight) and torch.equal(back.scale, tensor.scale)
        assert torch.equal(back.zeros(), tensor.zeros())
        assert torch.equal(back.dequantize(torch.float32), tensor.dequantize(torch.float32))
    return held


class Pair(nn.Module):
    """A norm with a layer behind it, and an attention of one head whose values are as wide as the input."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.norm, self.up_proj, self.head_dim = nn.RMSNorm(k), nn.Linear(k, n, bias=False), 32
        self.v_proj, self.o_proj = nn.Linear(k, 32, bias=False), nn.Linear(32, n)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.up_proj(y) + self.o_proj(self.v_proj(y))  # type: ignore[no-any-return]


def check_transform(name: str, case: Case) -> None:
    """The function of the block stays, with outlier channels and a massive token among its inputs."""
    torch.manual_seed(case.k)
    block = Pair(case.n, case.k).requires_grad_(False)
    x = torch.randn(24, case.k)
    x[:, 1] *= 50
    x[0, 3] = 1e4
    stats = InputStats.empty(case.k, drift=True)
    stats.update(block.norm(x), block.norm(x) * 1.01)
    stats.sample = [block.norm(x)]
    layers = {"up_proj": case.scheme, "v_proj": case.scheme}
    stage = Stage(block, None, layers, stats, "norm", {}, lambda module: module(x))
    before = block(x)
    transform(name).apply(stage)
    torch.testing.assert_close(block(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().mean()))
