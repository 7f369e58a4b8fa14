"""The Triton product against float64: on a GPU, or interpreted (test_triton.py starts this file with TRITON_INTERPRET=1).

Interpreted in fp16 and fp32 only: the interpreter computes bf16 silently wrong.
"""

from itertools import cycle, product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

INTERPRETED = triton.knobs.runtime.interpret
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.kernels import LinearSpec, by_expert
from hf_quant.kernels import triton_wna16 as module
from hf_quant.kernels._triton import fallback, naive
from hf_quant.kernels._triton.planar import grouped, plane
from hf_quant.kernels._triton.tiles import Tile
from hf_quant.kernels.triton_wna16 import BACKEND, triton_experts, triton_wna16
from hf_quant.methods import method
from hf_quant.nn import QuantLinear
from hf_quant.nn._weight import frozen

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = {torch.float16: 2e-3, torch.float32: 1e-5} | ({} if INTERPRETED else {torch.bfloat16: 1e-2})
KINDS = [*product((2, 3, 4, 8), ("", "-asym", "-asym-real")), (4, "-nf4"), (4, "-fp4")]
SIZES = {32: (33, 96), 64: (65, 192), 128: (130, 384), -1: (5, 160), 16: (16, 96)}
ROWS = (1, 3, 16, 17, 130)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory a kernel forgets to write is NaN."""
    plain = torch.Tensor.new_empty

    def made(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tensor = plain(self, *args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", made)


def layer(n: int, k: int, slug: str, dtype: torch.dtype) -> tuple[QuantizedTensor, LinearSpec]:
    scheme = QuantScheme.parse(slug)
    if scheme.foreign:
        scale = (torch.rand(n, scheme.groups(k)) + 0.1).to(torch.float32 if scheme.codebook else dtype)
        zero = (torch.rand(n, scheme.groups(k)) * scheme.qmax).to(dtype) if scheme.real_zero else None
        packed = torch.randint(256, (n, scheme.packed_bytes(k)), dtype=torch.uint8)
        weight = QuantizedTensor(packed, scale, zero, scheme)
    else:
        weight = method("rtn", steps=0).quantize(torch.randn(n, k), scheme, dtype)
    zero = None if weight.zero_point is None else weight.zero_point.to(DEVICE)
    outliers = weight.outliers
    if outliers is not None:
        outliers = Outliers(outliers.index.to(DEVICE), outliers.value.to(DEVICE))
    moved = QuantizedTensor(weight.qweight.to(DEVICE), weight.scale.to(DEVICE), zero, scheme, outliers=outliers)
    return moved, LinearSpec(scheme, n, k, dtype, DEVICE)


def off(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


CASES = [
    (bits, kind, group, m, dtype, extra)
    for (bits, kind, group), m, dtype, extra in zip(
        [(bits, kind, group) for group in SIZES for bits, kind in KINDS],
        cycle(ROWS), cycle(DTYPES), cycle(("", "-o2%", "", "-o4%-columns", "bias")),
    )
]  # fmt: skip


@pytest.mark.parametrize(("bits", "kind", "group", "m", "dtype", "extra"), CASES)
def test_equals_float64(bits: int, kind: str, group: int, m: int, dtype: torch.dtype, extra: str) -> None:
    torch.manual_seed(bits)
    n, k = SIZES[group]
    slug = f"W{bits}A16-g{group}{kind}"
    if extra.startswith("-o") and kind in ("", "-asym"):
        slug += extra
    weight, spec = layer(n, k, slug, dtype)
    backend = BACKEND()
    assert backend.why_not(spec) is None
    bias = torch.randn(n, dtype=dtype, device=DEVICE) if extra == "bias" else None
    x = torch.randn(2, m, k, device=DEVICE).to(dtype)
    prepared = backend.prepare(weight, spec)
    assert torch.equal(backend.restore(prepared, spec), weight.qweight)
    expected = x.double() @ weight.dequantize(torch.float64).T + (0 if bias is None else bias.double())
    got = backend.fused(x, prepared, spec, bias, weight.outliers)
    assert got.dtype is dtype and got.shape == (2, m, n)
    assert off(got, expected) < DTYPES[dtype]
    if DEVICE != "cpu" or m < 20:
        assert torch.equal(got, backend.fused(x, prepared, spec, bias, weight.outliers))  # the same bits every time
    assert not prepared.counters.any()  # counters are as they were


TILES = [
    Tile(8, 32, 2, 3, 4),
    Tile(16, 64, 4, 2, 2),
    Tile(32, 32, 4, 2, 3),
    Tile(64, 64, 4, 2, 1),
    Tile(64, 64, 4, 2, 2),
]


SLUGS = ["W4A16-g128", "W8A16-g64-asym-o1%", "W2A16-g-1-asym-real", "W3A16-g128-o1%-columns", "W4A16-g64-asym"]


@pytest.mark.parametrize(
    ("tile", "slug"), [*zip(TILES, SLUGS, strict=True), (TILES[0], SLUGS[3]), (TILES[4], SLUGS[0])]
)
def test_columns_shared_by_several_programs(tile: Tile, slug: str) -> None:
    weight, spec = layer(70, 2176, slug, torch.float16)  # 8.5 blocks of four bits
    w = BACKEND().prepare(weight, spec)
    x, bias = torch.randn(19, 2176, device=DEVICE).half(), torch.randn(70, device=DEVICE).half()
    index, value = (weight.outliers.index, weight.outliers.value) if weight.outliers else (None, None)
    args = (x, w.packed, w.counters, w.scale, w.zero, None, bias, index, value, spec.scheme, tile)
    got = module.launch(*args)
    size = plane(grouped(spec.scheme, 2176), spec.scheme.bits)
    dense = naive.weights(w.packed, w.scale, w.zero, None, spec.scheme, size, 2176)
    block = 16 // spec.scheme.bits * size
    expected = naive.product(x, dense, bias, index, value, split_k=tile.split_k, block=block)
    assert off(got.cpu(), expected) < 2e-3
    assert off(expected.to(DEVICE), x.double() @ weight.dequantize(torch.float64).T + bias.double()) < 1e-6
    assert torch.equal(got, module.launch(*args)) and not w.counters.any()


@pytest.mark.parametrize(
    "slug", ["W4A16-g32-asym-o4%", "W3A16-g64-o2%-columns", "W4A16-g64-nf4", "W8A16-g-1-asym-real"]
)
def test_many_rows_are_multiplied_by_the_dequantized_weight(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tile_for", lambda *_, **__: None)
    monkeypatch.setattr(module, "CHUNK", 20 * 192)  # some rows at a time
    weight, spec = layer(65, 192, slug, torch.float16)
    x, bias = torch.randn(40, 192, device=DEVICE).half(), torch.randn(65, device=DEVICE).half()
    prepared = BACKEND().prepare(weight, spec)
    got = BACKEND().fused(x, prepared, spec, bias, weight.outliers)
    assert off(got, x.double() @ weight.dequantize(torch.float64).T + bias.double()) < 2e-3
    if weight.outliers is None:  # rounded once, as `dequantize` does
        rows = module._dense(
            prepared.packed, prepared.scale, prepared.zero, prepared.table, None, None, spec.scheme, 192, torch.float16
        )
        assert torch.equal(torch.cat([w for _, _, w in rows]), weight.dequantize(torch.float16))


@pytest.mark.parametrize("slug", ["W4A16-g32-asym-o4%", "W4A16-g64-nf4"])
def test_a_kernel_that_cannot_be_launched_is_replaced(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Tensor:
        raise OutOfResources(262144, 232448, "shared memory")

    monkeypatch.setattr(module, "launch", refused)
    monkeypatch.setattr(fallback, "_failed", set())
    weight, spec = layer(65, 192, slug, torch.float16)
    x, prepared = torch.randn(9, 192, device=DEVICE).half(), BACKEND().prepare(weight, spec)
    got = BACKEND().fused(x, prepared, spec, None, weight.outliers)
    assert off(got, x.double() @ weight.dequantize(torch.float64).T) < 2e-3
    assert len(fallback._failed) == 1


@pytest.mark.parametrize("slug", ["W3A16-g32-asym", "W4A16-g32-nf4", "W4A16-g32-o4%", "W2A16-g32-o4%-columns"])
def test_gradient_and_schema(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 20 * 64)
    weight, spec = layer(33, 64, slug, torch.float32)
    prepared = BACKEND().prepare(weight, spec)
    x, bias = torch.randn(3, 64, device=DEVICE, requires_grad=True), torch.randn(33, device=DEVICE, requires_grad=True)
    grad = torch.randn(3, 33, device=DEVICE)
    BACKEND().fused(x, prepared, spec, bias, weight.outliers).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight.dequantize(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, grad.sum(0))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    args = (x, *module._operands(prepared, bias, weight.outliers), slug)
    torch.library.opcheck(triton_wna16, args, test_utils=checks)
    assert triton_wna16(x[:0], *args[1:]).shape == (0, 33)


def test_a_layer() -> None:
    """`QuantLinear` chooses it, keeps one copy of the codes, and adds bias and outliers in the kernel."""
    weight, spec = layer(80, 128, "W4A16-g64-asym-o2%", torch.float16)
    made = QuantLinear(128, 80, spec.scheme, bias=True, dtype=torch.float16).to(DEVICE)
    from hf_quant.formats import format_named

    for name, tensor in format_named("native").write(weight).items():
        setattr(made, name, frozen(tensor))
    made.bias = frozen(torch.randn(80, device=DEVICE).half())
    made.choose_kernel()
    assert type(made._backend) is BACKEND and made.weight.numel() == 0
    x = torch.randn(2, 5, 128, device=DEVICE).half()
    expected = x.double() @ weight.dequantize(torch.float64).T + made.bias.double()
    assert off(made(x), expected) < 2e-3
    assert torch.equal(made.state_dict()["weight"], format_named("native").write(weight)["weight"])


def test_refusals() -> None:
    spec = LinearSpec(QuantScheme(4, 32), 32, 64, torch.bfloat16, DEVICE)
    assert ("silently wrong" in (BACKEND().why_not(spec) or "")) is INTERPRETED
    spec = LinearSpec(QuantScheme(4, 32), 32, 64, torch.float64, DEVICE)
    assert "float64" in (BACKEND().why_not(spec) or "")


@pytest.mark.parametrize(
    "slug", ["W4A16-g128", "W4A16-g64-asym", "W2A16-g-1-asym-real", "W3A16-g128-asym", "W4A16-g-1"]
)
def test_zero_points_times_the_sum_of_x(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How bfloat16 runs on AMD, here in float16 and without PTX."""
    plain = module.constants
    without = {"ASM": None, "OPERANDS": None, "AT": -1, "FOLD": True}
    monkeypatch.setattr(module, "constants", lambda *args: plain(*args) | without)
    weight, spec = layer(33, 640, slug, torch.float16)
    x, prepared = torch.randn(3, 640, device=DEVICE).half(), BACKEND().prepare(weight, spec)
    assert off(BACKEND().linear(x, prepared, spec), x.double() @ weight.dequantize(torch.float64).T) < 2e-3


def stacked(slug: str, experts: int, n: int, k: int, dtype: torch.dtype) -> tuple[QuantizedTensor, LinearSpec]:
    made = [layer(n, k, slug, dtype) for _ in range(experts)]
    return QuantizedTensor.stack([weight for weight, _ in made]), made[0][1]


def routed(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, chosen: Tensor) -> Tensor:
    """Rows in the order of the experts, in float64; those of experts that are not here are zero."""
    dense = torch.cat(
        [weight.dequantize(torch.float64), torch.zeros(1, *weight.scale.shape[1:2], x.shape[1], device=DEVICE)]
    )
    y = torch.einsum("mk,mtnk->mtn", x.double(), dense[chosen])
    if bias is not None:
        y = y + torch.cat([bias.double(), torch.zeros_like(bias[:1])])[chosen]
    return y.flatten(0, 1)[chosen.flatten().sort(stable=True).indices]


@pytest.mark.parametrize(
    ("slug", "split"),
    [("W4A16-g128", 1), ("W4A16-g64-asym", 2), ("W8A16-g-1", 2), ("W3A16-g128-o2%", 2), ("W4A16-g64-nf4", 1),
     ("W2A16-g128-o4%-columns", 2), ("W4A16-g64-asym-real", 2)],
)  # fmt: skip
@pytest.mark.parametrize("m", [1, 21])
def test_experts(slug: str, split: int, m: int) -> None:
    weight, spec = stacked(slug, 3, 40, 640, torch.float16)
    prepared = BACKEND().prepare(weight, spec)
    assert torch.equal(BACKEND().restore(prepared, spec), weight.qweight)
    x, bias = torch.randn(m, 640, device=DEVICE).half(), torch.randn(3, 40, device=DEVICE).half()
    chosen = torch.randint(4, (m, 2), device=DEVICE)  # expert 3 is another rank's
    ends, order = by_expert(chosen, 3)
    operands = module._operands(prepared, bias, weight.outliers)
    expected = routed(x, weight, bias, chosen)
    got = module.launch(x, *operands, spec.scheme, Tile(8, 32, 2, 2, split), ends, order)
    assert got.shape == (2 * m, 40) and float((got - expected).norm()) <= 2e-3 * float(expected.norm())
    assert not prepared.counters.any()
    each = x[order // 2]  # the second product of experts is given rows that are sorted
    again = module.launch(each, *operands, spec.scheme, Tile(8, 32, 2, 2, split), ends)
    assert torch.equal(got, again) and torch.equal(BACKEND().experts(x[:0], prepared, spec, ends, order[:0]), got[:0])


ROUTES = {
    "one expert only": [[1]] * 37,
    "none of them here": [[3], [4]],
    "the first and the last": [[0, 2]] * 9,
    "all to all": [[0, 1, 2], [2, 0, 1]],
    "just over a tile": [[0]] * 17 + [[2]] * 16,
}


@pytest.mark.parametrize("densely", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_uneven_routes(route: str, densely: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if densely:
        monkeypatch.setattr(module, "tile_for", lambda *_, **__: None)
    weight, spec = stacked("W4A16-g64-asym-o2%", 3, 33, 128, torch.float16)
    chosen = torch.tensor(ROUTES[route], device=DEVICE)
    x, bias = torch.randn(len(chosen), 128, device=DEVICE).half(), torch.randn(3, 33, device=DEVICE).half()
    expected = routed(x, weight, bias, chosen.clamp(max=3))
    ends, order = by_expert(chosen, 3)
    got = BACKEND().experts(x, BACKEND().prepare(weight, spec), spec, ends, order, bias, weight.outliers)
    assert float((got - expected).norm()) <= 2e-3 * float(expected.norm())


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("slug", ["W3A16-g32-asym", "W4A16-g32-nf4", "W4A16-g32-o4%", "W2A16-g32-o4%-columns"])
def test_gradient_and_schema_of_experts(slug: str, sort: bool) -> None:
    weight, spec = stacked(slug, 3, 33, 64, torch.float32)
    operands = module._operands(BACKEND().prepare(weight, spec), None, weight.outliers)
    chosen = torch.tensor([[0, 2], [2, 3], [0, 3], [2, 0]], device=DEVICE)
    ends, order = by_expert(chosen, 3)
    x = torch.randn(8 if sort else 4, 64, device=DEVICE, requires_grad=True)
    bias = torch.randn(3, 33, device=DEVICE, requires_grad=True)
    args = (x, *operands[:5], bias, *operands[6:], slug, ends, None if sort else order)
    dense, owner = weight.dequantize(), chosen.flatten()[order].tolist()
    picked = x if sort else x[order // 2]
    rows = [
        row @ dense[e].T + bias[e] if e < 3 else torch.zeros_like(bias[0])
        for row, e in zip(picked, owner, strict=True)
    ]
    grad = torch.randn(8, 33, device=DEVICE)
    expected = torch.autograd.grad(torch.stack(rows), (x, bias), grad)
    got = torch.autograd.grad(triton_experts(*args), (x, bias), grad)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(triton_experts, args, test_utils=checks)
