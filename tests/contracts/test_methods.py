"""What every method promises, whichever it is."""

import re
from importlib import import_module
from itertools import product

import pytest
import torch
from torch import Tensor

from hf_quant import _plugins
from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.methods import Method, method
from hf_quant.methods._nearest import nearest

METHODS = _plugins.names("methods")
SCHEMES = [QuantScheme(*args) for args in product(BITS, (32, 128, -1), (True, False))]


def heavy_tailed(n: int, k: int) -> Tensor:
    return torch.distributions.StudentT(3.0).sample((n, k)) * 0.02


WEIGHTS = {
    "normal": lambda: torch.randn(48, 256) * 0.02,
    "heavy-tailed": lambda: heavy_tailed(48, 256),
    "one outlier": lambda: torch.randn(48, 256).index_fill_(1, torch.tensor(7), 40.0),
    "positive": lambda: torch.rand(48, 256) + 1,
    "zero": lambda: torch.zeros(48, 256),
    "tiny": lambda: torch.randn(48, 256) * 1e-9,
}


def seen(name: str) -> InputStats | None:
    """Inputs of 256 columns, all alike, for a method that needs them."""
    if not method(name).calibrated:
        return None
    stats = InputStats.empty(256)
    stats.update(torch.randn(1024, 256))
    return stats


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_frozen_and_cites_its_paper(name: str) -> None:
    made = method(name)
    assert isinstance(made, Method)
    with pytest.raises(AttributeError):
        made.anything = 1  # type: ignore[attr-defined]
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|https://", import_module(f"hf_quant.methods.{name}").__doc__ or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", METHODS)
def test_what_comes_out_of_a_method(name: str, kind: str, scheme: QuantScheme, dtype: torch.dtype) -> None:
    weight = WEIGHTS[kind]().to(dtype)
    before = weight.clone()
    made = method(name).quantize(weight, scheme, dtype, seen(name))
    assert torch.equal(weight, before)
    assert made.scheme == scheme and made.in_features == 256
    assert made.scale.dtype == dtype and made.scale.shape == (48, scheme.groups(256))
    assert (made.scale > 0).all() and made.scale.isfinite().all()
    assert (made.zero_point is None) == scheme.symmetric
    assert int(made.codes().max()) <= scheme.qmax
    if made.zero_point is not None:
        assert made.zero_point.dtype == torch.uint8 and int(made.zero_point.max()) <= scheme.qmax
    assert made.dequantize(torch.float32).isfinite().all()
    if kind == "zero":
        assert (made.dequantize() == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_error_is_below_a_step(name: str, scheme: QuantScheme) -> None:
    """Of the plain min/max grid: a method may clip, but on a bounded weight only where that is worth it."""
    weight = torch.rand(48, 256) * 2 - 1
    made = method(name).quantize(weight, scheme, torch.float32, seen(name))
    step = 2 / scheme.qmax
    assert float((made.dequantize(torch.float32) - weight).square().mean().sqrt()) < step / 2
    plain = method("rtn", steps=0).quantize(weight, scheme, torch.float32)
    assert float((plain.dequantize(torch.float32) - weight).abs().max()) < step


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "one outlier", "positive"])
def test_the_search_of_rtn_never_loses(kind: str, scheme: QuantScheme) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        weight = WEIGHTS[kind]()
        plain, searched = (
            (method("rtn", **steps).quantize(weight, scheme, torch.float32).dequantize(torch.float32) - weight)
            .double()
            .unflatten(-1, (scheme.groups(256), -1))
            .square()
            .sum(-1)
            for steps in ({"steps": 0}, {})
        )
        assert (searched <= plain * (1 + 1e-5)).all()  # in every group, up to rounding
        assert searched.sum() <= plain.sum() * (1 + 1e-6)


INPUTS = {
    "normal": lambda: torch.randn(256, 64),
    "one token": lambda: torch.randn(1, 64),
    "same token": lambda: torch.randn(1, 64).expand(256, 64),
    "one direction": lambda: torch.randn(256, 1) * torch.ones(64),
}


@pytest.mark.parametrize(
    "slug", ["W2A16-g32", "W3A16-g64-asym", "W4A16-g32", "W4A16-g64-asym-o3%", "W4A16-g64-o3%-columns"]
)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", METHODS)
def test_with_inputs_no_row_loses_to_plain_rounding(name: str, kind: str, slug: str) -> None:
    """By the squared error of its output on those inputs, which is what calibration is for; outliers are another's choice."""
    scheme = QuantScheme.parse(slug)
    for seed in range(3):
        torch.manual_seed(seed)
        x, weight = INPUTS[kind]().double(), torch.randn(8, 64)
        stats = InputStats.empty(64)
        stats.update(x.float())
        made = method(name).quantize(weight, scheme, torch.float32, stats)
        columns = made.outliers.index.long() if made.outliers is not None and scheme.outlier_columns else None
        plain = nearest(weight, scheme, torch.float32, 0, 0.6, None, columns)
        lost, least = (
            ((each.dequantize(torch.float32) - weight).double() @ x.T).square().sum(1) for each in (made, plain)
        )
        assert (lost <= least * 1.001 + 1e-9).all(), (lost / least).max()


def test_rows_searched_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = torch.randn(33, 256), QuantScheme(4, 32, symmetric=False)
    whole = method("rtn").quantize(weight, scheme, torch.float32)
    monkeypatch.setattr("hf_quant.methods._nearest.CHUNK", 1000)
    parts = method("rtn").quantize(weight, scheme, torch.float32)
    assert torch.equal(whole.dequantize(), parts.dequantize())
