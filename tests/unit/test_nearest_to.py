"""The nearest codes on a grid that is given, for every kind of scheme."""

from dataclasses import replace

import pytest
import torch

from hf_quant.core.packing import pack
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import Outliers, QuantizedTensor

KINDS = [
    "W2A16-g32-asym", "W3A16-g-1-o5%", "W8A16-g32-o5%-columns", "W4A16-g32-nf4", "W4A16-g32-fp4", "W4A16-g32-asym-real",
    "W4A16-g32-asym-perm",
]  # fmt: skip
N, K = 6, 64


def tensor(scheme: QuantScheme) -> QuantizedTensor:
    groups, outliers = scheme.groups(K), None
    codes = torch.randint(0, scheme.qmax + 1, (N, K), dtype=torch.uint8)
    zero = torch.rand(N, groups) * scheme.qmax
    if scheme.outliers:
        rows = 1 if scheme.outlier_columns else N
        index = torch.stack([torch.randperm(K)[: scheme.outlier_count(K)].sort().values for _ in range(rows)])
        codes.scatter_(1, index.expand(N, -1), scheme.zero)
        value = torch.randn(N, index.shape[1])
        outliers = Outliers(index[0] if scheme.outlier_columns else index, value)
    made = QuantizedTensor.from_codes(codes, torch.rand(N, groups) + 0.5, zero, scheme, outliers)
    perm = torch.stack([torch.randperm(K), torch.randperm(K)]).int() if scheme.permuted else None
    return replace(made, perm=perm, zero_point=zero if scheme.real_zero else made.zero_point)


@pytest.mark.parametrize("slug", KINDS)
def test_no_other_code_is_nearer(slug: str) -> None:
    held = tensor(QuantScheme.parse(slug))
    same = held.nearest_to(held.dequantize())
    assert torch.equal(same.dequantize(), held.dequantize()), "what it holds stays"
    weight = torch.randn(N, K) * held.dequantize().abs().mean()
    made = held.nearest_to(weight)
    assert (
        made.scheme == held.scheme and torch.equal(made.scale, held.scale) and torch.equal(made.zeros(), held.zeros())
    )
    plain = replace(held, outliers=None)
    every = [replace(plain, qweight=pack(torch.full((N, K), c, dtype=torch.uint8), held.scheme.bits)).dequantize()
             for c in range(held.scheme.qmax + 1)]  # fmt: skip
    least = (torch.stack(every) - weight).abs().amin(0)
    if made.outliers is not None:
        least = least.scatter(1, made.outliers._by_row(), 0)  # which hold any value
    torch.testing.assert_close((made.dequantize() - weight).abs(), least, atol=1e-5, rtol=1e-5)


def test_a_scale_of_zero_means_zero() -> None:
    held = tensor(QuantScheme.parse("W4A16-g32"))
    held = replace(held, scale=held.scale.index_fill(1, torch.tensor([0]), 0))
    made = held.nearest_to(torch.randn(N, K)).dequantize()
    assert not made[:, :32].any() and made[:, 32:].any()
