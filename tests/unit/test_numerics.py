"""The affine map at its edges: nothing to see in a group, numbers too small or too large for the scale's type."""

import pytest
import torch

from hf_quant.numerics import dequantize, floored, minmax, quantize
from hf_quant.scheme import BITS, QuantScheme

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCHEMES = [QuantScheme(bits, 32, symmetric) for bits in BITS for symmetric in (True, False)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-8, 1.0, -1.0])
def test_a_constant_group_stays_finite(value: float, scheme: QuantScheme, dtype: torch.dtype) -> None:
    groups = torch.full((2, 3, 32), value)
    scale, zero = minmax(groups, scheme)
    scale = floored(scale, dtype)
    codes = quantize(groups, scale, zero, scheme.qmax)
    made = dequantize(codes, scale, zero)
    assert (scale > 0).all() and scale.isfinite().all()
    assert made.isfinite().all()
    assert ((made - groups).abs() <= scale * 1.01).all()
    if value == 0:
        assert (made == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_is_never_zero_nor_infinite(dtype: torch.dtype) -> None:
    scale = floored(torch.tensor([0.0, 1e-45, 1e-12, 1e-7, 1.0, 3e38]), dtype)
    assert (scale > 0).all() and scale.isfinite().all()
    assert torch.equal(scale, scale.to(dtype).float())  # what will be stored is what was computed with


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_minmax_covers_the_group(scheme: QuantScheme) -> None:
    groups = torch.randn(4, 5, 32) + torch.linspace(-3, 3, 5)[:, None]
    scale, zero = minmax(groups, scheme)
    assert scale.shape == zero.shape == (4, 5, 1)
    assert ((zero >= 0) & (zero <= scheme.qmax) & (zero == zero.round())).all()
    made = dequantize(quantize(groups, scale, zero, scheme.qmax), scale, zero)
    assert ((made - groups).abs() <= scale * 0.51 + (scale / 2 if not scheme.symmetric else scale * 0.01)).all()


def test_asymmetric_zero_is_exact() -> None:
    groups = torch.rand(3, 2, 32) + 1
    groups[..., 0] = 0
    for bits in BITS:
        scheme = QuantScheme(bits, 32, symmetric=False)
        scale, zero = minmax(groups, scheme)
        made = dequantize(quantize(groups, scale, zero, scheme.qmax), scale, zero)
        assert (made[..., 0] == 0).all()
