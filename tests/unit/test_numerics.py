"""The affine map at its edges: nothing to see in a group, numbers too small or too large for the scale's type."""

import pytest
import torch

from hf_quant.core.numerics import dequantize, floored, levels, minmax, quantize, same_bits
from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.methods import method

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCHEMES = [QuantScheme(bits, 32, symmetric) for bits in BITS for symmetric in (True, False)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-8, 1.0, -1.0])
def test_a_constant_group_stays_finite(value: float, scheme: QuantScheme, dtype: torch.dtype) -> None:
    groups = torch.full((2, 3, 32), value)
    scale, zero = minmax(groups, scheme)
    scale = floored(scale, dtype)
    codes = quantize(groups, scale, zero, scheme)
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
    made = dequantize(quantize(groups, scale, zero, scheme), scale, zero)
    assert ((made - groups).abs() <= scale * 0.51 + (scale / 2 if not scheme.symmetric else scale * 0.01)).all()


def test_asymmetric_zero_is_exact() -> None:
    groups = torch.rand(3, 2, 32) + 1
    groups[..., 0] = 0
    for bits in BITS:
        scheme = QuantScheme(bits, 32, symmetric=False)
        scale, zero = minmax(groups, scheme)
        made = dequantize(quantize(groups, scale, zero, scheme), scale, zero)
        assert (made[..., 0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("std", [2e-3, 5e-4, 1e-4])
def test_small_weights_lose_no_more_in_float16(std: float, bits: int) -> None:
    """Their scales are subnormal there: 2.7 times the error at 5e-4 and 8 bits, were they floored at normal numbers."""
    torch.manual_seed(0)
    weight = (torch.randn(16, 256) * std).half().float()
    lost = []
    for dtype in (torch.float16, torch.float32):
        made = method("rtn").quantize(weight, QuantScheme(bits, 128), dtype).dequantize(torch.float64)
        lost.append(float((made - weight).norm()))
    assert lost[0] < 1.1 * lost[1]


def test_a_single_number_has_the_same_bits_whatever_its_stride() -> None:
    one = torch.ones(16).as_strided((1, 1), (1, 16))
    assert one.is_contiguous() and one.view(-1).stride() == (16,)
    assert same_bits(one, torch.ones(1, 1)) and not same_bits(one, torch.zeros(1, 1))


def test_levels_made_in_inference_mode_are_ordinary_tensors() -> None:
    levels.cache_clear()
    with torch.inference_mode():
        levels("nf4", torch.device("cpu"))
    x = torch.ones(16, requires_grad=True)
    (x * levels("nf4", torch.device("cpu"))).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
