"""Layers whose in_features is no multiple of 32, with every kernel that runs here; interpreted too (see test_triton.py)."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant import _plugins
from hf_quant.core.numerics import quantize_rows
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import SchemeError
from hf_quant.formats import formats
from hf_quant.kernels import refusal
from hf_quant.methods import method, quantize
from hf_quant.nn import QuantEmbedding, QuantLinear
from hf_quant.nn._requantizing import requantize
from hf_quant.nn._weight import frozen

SLUGS = [
    "W4A16-g32", "W4A16-g128-asym", "W8A16-g32", "W3A16-g32", "W2A16-g64-asym", "W4A16-g32-o1%", "W4A16-g32-asym-o2%-columns",
    "W4A16-g32-perm", "W8A8", "W8A8-static", "W8A8-threshold", "W4A8-g64", "W4A8-g64-o5%-columns",
]  # fmt: skip
SHAPES = {100: 40, 588: 33}
WIDE = {2730: 5, 3420: 5, 4304: 5}  # with some of the schemes
DTYPES = (torch.float32, torch.bfloat16)


def tolerance(name: str | None, dtype: torch.dtype, scheme: QuantScheme) -> float:
    """Of the norm: some CPUs multiply 4 bits in bf16, and INT8 activations may be rounded to the neighbour of a tie."""
    narrow = dtype is torch.bfloat16 or name == "cpu_int4" or (scheme.activations and scheme.bits == 4)
    return 1e-2 if narrow else 5e-4 if scheme.activations else 2e-5


def coded(slug: str, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[QuantizedTensor, Tensor]:
    """A weight, and what was rounded; permuted ones, which are only read, have their columns in a random order."""
    asked = QuantScheme.parse(slug)
    scheme, weight, stats = replace(asked, permuted=False).fitted(k), torch.randn(n, k) / k**0.5, InputStats.empty(k)
    stats.update(torch.randn(64, k))
    made = quantize(method("rtn"), weight, scheme, dtype, stats if scheme.activations else None)
    if scheme.activations == "tensor":
        made = replace(made, input_scale=torch.tensor([4 / 127], dtype=dtype))
    if asked.permuted:
        order = torch.randperm(made.columns)[None].int()
        made = replace(made, scheme=replace(scheme, permuted=True), perm=order)
    return made, weight


def expected(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """In float64, with the inputs rounded as the scheme says."""
    wide, columns = weight.dequantize(torch.float64), None
    if weight.scheme.activations is None:
        return x.double() @ wide.T
    if weight.outliers is not None:
        columns = weight.outliers.index.long()
    plain = x if columns is None else x.index_fill(-1, columns, 0)
    codes, scale = quantize_rows(plain, None if weight.input_scale is None else weight.input_scale.float())
    rounded = (codes * scale).double()
    return (rounded if columns is None else rounded.index_copy(-1, columns, x[..., columns].double())) @ wide.T


@pytest.mark.parametrize(("slug", "k"), [*product(SLUGS, SHAPES), *product(SLUGS[::4], WIDE)])
def test_every_kernel_equals_float64(slug: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(k)
    run, scheme = set(), QuantScheme.parse(slug)
    for dtype in DTYPES:
        weight, _ = coded(slug, (SHAPES | WIDE)[k], k, dtype)
        layer = QuantLinear.of(weight, dtype)
        for name in [None, *_plugins.names("kernels")]:
            if name is not None and refusal(_plugins.load("kernels", name).BACKEND(), layer.spec) is not None:
                continue
            with monkeypatch.context() as only:
                only.setenv("HF_QUANT_BACKEND", name) if name else only.delenv("HF_QUANT_BACKEND", raising=False)
                layer.choose_kernel()
                for rows in ((1,), (2, 17)):
                    x = torch.randn(*rows, k).to(dtype)
                    y, wanted = layer(x), expected(x, weight)
                    off = float((y.double() - wanted).norm() / wanted.norm())
                    assert y.shape == (*rows, len(weight.scale))
                    assert off < tolerance(name, dtype, scheme), (name, dtype, rows, off)
                run.add(name)
        for part, tensor in weight.parts().items():
            assert torch.equal(layer.state_dict()[part], tensor)
    assert len(run) > 1 or scheme.activations


@pytest.mark.parametrize("slug", SLUGS)
def test_outside_it_has_the_width_of_the_weight(slug: str) -> None:
    weight, rounded = coded(slug, 40, 100, torch.bfloat16)
    layer = QuantLinear.of(weight)
    assert weight.scheme.padding == 28 and QuantScheme.parse(str(weight.scheme)) == weight.scheme
    assert (weight.in_features, weight.columns, layer.in_features) == (100, 128, 100)
    assert layer.weight.shape == layer.dequantize().shape == (40, 100)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4000
    if weight.perm is None:
        wide = QuantScheme.parse(slug).bits
        assert float((layer.dequantize().float() - rounded).norm() / rounded.norm()) < 2.2 / 2**wide
    again = layer.dequantize(torch.float32)
    assert torch.equal(weight.nearest_to(again).dequantize(torch.float32), again)
    requantize(layer, "weight", again)
    assert torch.equal(layer.dequantize(torch.float32), again)
    scheme = weight.scheme
    assert scheme.bits_per_weight(100) > 1.28 * scheme.bits
    assert torch.equal(QuantLinear.from_tensors(weight.parts(), scheme).dequantize(), layer.dequantize())


def test_formats_of_others_name_the_native_one() -> None:
    scheme = QuantScheme(4, 32).fitted(100)
    for name, fmt in formats().items():
        reason = fmt.why_not(scheme)
        assert (reason is None) == (name == "native")
        assert reason is None or "the native format" in reason or "read and run, not written" in reason


def test_what_is_cut_out_of_it_keeps_the_padding_with_its_last_columns() -> None:
    weight, _ = coded("W4A16-g32-asym-o2%", 40, 100)
    layer, dense = QuantLinear.of(weight), weight.dequantize()
    for axis, start, count in ((0, 8, 16), (1, 0, 64), (1, 64, 36), (1, 96, 4)):
        part = layer.narrowed(axis, start, count)
        assert torch.equal(part.dequantize(), dense.narrow(axis, start, count))
        assert part.scheme.padding == (0 if (axis, start) == (1, 0) else 28)
    with pytest.raises(SchemeError, match="cut what"):
        layer.narrowed(1, 0, 50)
    joined = QuantLinear.joined([layer, layer])
    assert joined is not None and torch.equal(joined.dequantize(), dense.repeat(2, 1))


@pytest.mark.parametrize("slug", ["W4A16-g32", "W8A8"])
def test_it_compiles_into_one_graph(slug: str) -> None:
    layer, x = QuantLinear.of(coded(slug, 40, 100, torch.bfloat16)[0]), torch.randn(3, 100).bfloat16()
    with torch.no_grad():
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, layer(x))


def test_gradients_reach_the_inputs() -> None:
    weight, _ = coded("W4A16-g32", 40, 100)
    x = torch.randn(3, 100, requires_grad=True)
    QuantLinear.of(weight)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_layers_that_need_no_padding_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = coded("W4A16-g32", 40, 96)
    layer, x = QuantLinear.of(weight), torch.randn(3, 96)

    def refused(*_: object) -> Tensor:
        raise AssertionError("padded")

    monkeypatch.setattr(F, "pad", refused)
    assert weight.scheme.padding == 0 and weight.stored is weight and layer(x).shape == (3, 40)


def test_rows_of_a_table() -> None:
    weight, _ = coded("W4A16-g32-asym", 40, 100, torch.bfloat16)
    table = QuantEmbedding(40, 100, weight.scheme, padding_idx=None, dtype=torch.bfloat16)
    for name, tensor in weight.parts().items():
        setattr(table, name, frozen(tensor))
    table.finished()
    ids = torch.tensor([[3, 0], [39, 3]])
    assert torch.equal(table(ids), weight.dequantize()[ids]) and table.weight.shape == (40, 100)


def test_tiles_are_tuned_for_what_a_kernel_multiplies() -> None:
    pytest.importorskip("triton")
    from hf_quant.bench.gpu import layers_of

    model = torch.nn.Sequential(QuantLinear.of(coded("W4A16-g32", 40, 100)[0]))
    assert layers_of(model) == [(QuantScheme(4, 32), 40, 128, torch.float32)]
