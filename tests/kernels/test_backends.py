"""Every backend against float64, on every layer it says it can run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_quant import _plugins
from hf_quant.core.coded_scales import CodedScales
from hf_quant.core.k_quants import K_QUANTS
from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import HfQuantError
from hf_quant.kernels import LinearBackend, LinearSpec, refusal, select
from hf_quant.kernels._shared import blocks
from hf_quant.kernels.codebook import codebook_linear
from hf_quant.kernels.cpu_int4 import cpu_int4_linear
from hf_quant.kernels.dequant import dequant_linear
from hf_quant.methods import method

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = _plugins.names("kernels")
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory a kernel forgets to write is NaN."""
    plain, own, like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(plain))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(own))
    monkeypatch.setattr(torch, "empty_like", poison(like))


def layer(n: int, k: int, scheme: QuantScheme, dtype: torch.dtype) -> tuple[QuantizedTensor, LinearSpec]:
    if scheme.scale_bits is not None:
        codes = [
            torch.randint(1, max(2, 1 << bits), (n, scheme.groups(k)), dtype=torch.uint8) for bits in scheme.scale_bits
        ]
        unit = (torch.rand(n, scheme.units(k)) + 0.5) / (1 if scheme.codebook else 256)
        low = {} if scheme.symmetric else {"offset": codes[1], "offset_unit": unit.half()}
        coded = CodedScales(codes[0] & 63, unit.half() if scheme.blocks else unit, **low)
        packed = torch.randint(256, (n, scheme.packed_bytes(k)), dtype=torch.uint8)
        weight = QuantizedTensor.from_coded(packed, coded, scheme)
    elif scheme.foreign:
        scale = torch.rand(n, scheme.groups(k)) + 0.1
        zero = (torch.rand_like(scale) * scheme.qmax).to(dtype if scheme.real_zero else torch.uint8)
        zero = None if scheme.symmetric else zero
        finer = torch.float32 if scheme.codebook else dtype  # as bitsandbytes stores them
        packed = torch.randint(256, (n, scheme.packed_bytes(k)), dtype=torch.uint8)
        weight = QuantizedTensor(packed, scale.to(finer), zero, scheme)
    else:
        weight = method("rtn", steps=0).quantize(torch.randn(n, k), scheme, dtype)
    moved = QuantizedTensor(
        weight.qweight.to(DEVICE),
        weight.scale.to(DEVICE),
        None if weight.zero_point is None else weight.zero_point.to(DEVICE),
        scheme,
        coded=None if weight.coded is None else weight.coded.mapped(lambda part: part.to(DEVICE)),
    )
    return moved, LinearSpec(scheme, n, k, dtype, DEVICE)


def backend_for(name: str, spec: LinearSpec) -> LinearBackend[Any]:
    backend: LinearBackend[Any] = _plugins.load("kernels", name).BACKEND()
    assert isinstance(backend, LinearBackend)
    if reason := refusal(backend, spec):
        pytest.skip(reason)
    return backend


KINDS = [*(QuantScheme(bits, symmetric=symmetric) for bits in BITS for symmetric in (True, False))]
WIDE = [QuantScheme(5), QuantScheme(6, symmetric=False), QuantScheme(7, symmetric=False, real_zero=True)]
FOREIGN = [
    *(QuantScheme(4, codebook=name) for name in ("nf4", "fp4")),
    *(QuantScheme(bits, symmetric=False, real_zero=True) for bits in BITS),
]


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [*KINDS, *FOREIGN, *WIDE], ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize(
    ("n", "k", "group"), [(48, 256, 128), (112, 96, 32), (33, 160, 16), (5, 32, -1), (64, 160, -1), (336, 64, 64)]
)
def test_equals_float64(name: str, kind: QuantScheme, dtype: torch.dtype, n: int, k: int, group: int) -> None:
    weight, spec = layer(n, k, replace(kind, group_size=group), dtype)
    backend = backend_for(name, spec)
    prepared = backend.prepare(weight, spec)
    exact = weight.dequantize(torch.float64)
    tolerance = max(DTYPES[dtype], 1e-2 if name == "cpu_int4" else 0)  # few rows are rounded to bf16 there
    for m in (0, 1, 3, 17, 200):
        x = torch.randn(2, m, k, device=DEVICE).to(dtype)
        got = backend.linear(x, prepared, spec)
        assert got.shape == (2, m, n) and got.dtype == dtype
        expected = x.double() @ exact.T
        if m:
            assert (got.double() - expected).norm() / expected.norm() < tolerance, m


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slug", [*K_QUANTS, "W4A16-g16-nvfp4"])
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize(("n", "k"), [(33, 512), (64, 256)])
def test_scales_in_two_levels(name: str, slug: str, dtype: torch.dtype, n: int, k: int) -> None:
    test_equals_float64(name, QuantScheme.parse(slug), dtype, n, k, QuantScheme.parse(slug).group_size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [16, 48, 64, 80, 112, 128, 336, 1040])
@pytest.mark.parametrize("bits", [4, 8])
def test_restore_inverts_prepare(name: str, n: int, bits: int) -> None:
    weight, spec = layer(n, 64, QuantScheme(bits, 32), torch.bfloat16)
    backend = backend_for(name, spec)
    assert torch.equal(backend.restore(backend.prepare(weight, spec), spec), weight.qweight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "scheme", ["W4A16-g32-asym", "W8A16-g32", "W3A16-g-1", "W4A16-g32-nf4", "W4A16-g32-asym-real"]
)
@pytest.mark.parametrize("m", [3, 70])
def test_gradient(name: str, scheme: str, m: int) -> None:
    weight, spec = layer(48, 96, QuantScheme.parse(scheme), torch.float32)
    backend = backend_for(name, spec)
    x = torch.randn(m, 96, device=DEVICE, requires_grad=True)
    grad = torch.randn(m, 48, device=DEVICE)
    backend.linear(x, backend.prepare(weight, spec), spec).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ weight.dequantize(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dequant", "cpu_int4"])
@pytest.mark.parametrize("inference", [True, False])
def test_autocast_does_not_reach_into_the_op(name: str, inference: bool) -> None:
    weight, spec = layer(64, 96, QuantScheme(4, 32), torch.float32)
    backend = backend_for(name, spec)
    x = torch.randn(200, 96, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16), torch.inference_mode(inference):
        got = backend.linear(x, backend.prepare(weight, spec), spec)
    expected = x.double() @ weight.dequantize(torch.float64).T
    assert got.dtype is torch.float32 and (got.double() - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_does_not_lose_accuracy_with_the_number_of_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "compute_dtype", lambda x: x.dtype)  # as on a GPU
    monkeypatch.setattr(blocks, "BLOCK", 1 << 12)
    weight, spec = layer(4096, 64, QuantScheme(4, 32), dtype)
    backend = backend_for("dequant", spec)
    x = torch.randn(8, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    grad = torch.randn(8, 4096, device=DEVICE, dtype=dtype)
    backend.linear(x, backend.prepare(weight, spec), spec).backward(grad)
    assert x.grad is not None
    expected = grad.double() @ weight.dequantize(torch.float64)
    tolerance = 4e-3 if dtype is torch.bfloat16 else 5e-4
    assert (x.grad.double() - expected).norm() / expected.norm() < tolerance


def test_float64_layers_are_computed_in_float64() -> None:
    chosen = select(LinearSpec(QuantScheme(4, 32), 64, 64, torch.float64, DEVICE))
    assert type(chosen).__name__ == "Dequant"


def test_ops_are_well_formed() -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for symmetric in (True, False):
        weight, spec = layer(48, 64, QuantScheme(4, 32, symmetric), torch.float32)
        x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
        args = (x, weight.qweight, weight.scale, weight.zero_point, 4)
        torch.library.opcheck(dequant_linear, args, test_utils=tests)
        backend = _plugins.load("kernels", "cpu_int4").BACKEND()
        if refusal(backend, spec) is None:
            w = backend.prepare(weight, spec)
            args = (x, w.planes, w.scale_and_zero, w.scale, w.zero, 32, 8)
            torch.library.opcheck(cpu_int4_linear, args, test_utils=tests, atol=0.3, rtol=0.1)


def test_the_op_of_codebooks_is_well_formed() -> None:
    weight, spec = layer(48, 64, QuantScheme(4, 32, codebook="nf4"), torch.float32)
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    prepared = _plugins.load("kernels", "codebook").BACKEND().prepare(weight, spec)
    torch.library.opcheck(codebook_linear, (x, prepared.qweight, prepared.scale, prepared.table), test_utils=tests)


def test_what_a_codebook_holds() -> None:
    """bitsandbytes' own levels, in the order of its codes (its functional.get_4bit_type, 0.50.2)."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    for name, some in {"nf4": (-1.0, -0.6961928009986877), "fp4": (0.0, 0.0052083334885537624)}.items():
        weight = QuantizedTensor.from_codes(
            codes, torch.ones(1, 1), torch.zeros(1, 1), QuantScheme(4, -1, codebook=name)
        )
        assert weight.dequantize()[0, :2].tolist() == list(some)


def test_columns_in_another_order() -> None:
    plain, _ = layer(48, 64, QuantScheme(4, 32, symmetric=False), torch.float32)
    order = torch.randperm(64)
    mixed = QuantizedTensor(plain.qweight, plain.scale, plain.zero_point, plain.scheme, order[None].int())
    assert torch.equal(mixed.dequantize()[:, order], plain.dequantize())
    halves = torch.stack([order, order.flip(0)]).int()  # the gate and the up rows of experts each have their own
    both = QuantizedTensor(plain.qweight, plain.scale, plain.zero_point, plain.scheme, halves).dequantize()
    assert torch.equal(both[:24], mixed.dequantize()[:24])
    assert torch.equal(both[24:, order.flip(0)], plain.dequantize()[24:])


def test_select_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LinearSpec(QuantScheme(4, 32), 64, 64, torch.bfloat16, "cpu")
    assert select(spec).repacks
    assert not select(spec, repacking=False).repacks
    monkeypatch.setenv("HF_QUANT_BACKEND", "reference")
    assert type(select(spec)).__name__ == "Reference"
    monkeypatch.setenv("HF_QUANT_BACKEND", "cpu_int4")
    with pytest.raises(HfQuantError, match="cpu_int4: no packed product for 2 bits"):
        select(LinearSpec(QuantScheme(2, 32), 64, 64, torch.bfloat16, "cpu"))
    monkeypatch.setenv("HF_QUANT_BACKEND", "cublas")
    with pytest.raises(HfQuantError, match="cublas"):
        select(spec)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_no_scheme_is_refused_on_a_cpu(bits: int, dtype: torch.dtype) -> None:
    for group in (16, 32, -1):
        for symmetric in (True, False):
            for n in (5, 64):
                chosen = select(LinearSpec(QuantScheme(bits, group, symmetric), n, 96, dtype, "cpu"))
                assert type(chosen).__name__ != "Reference"


@pytest.mark.parametrize("scheme", ["W8A16-g32", "W4A16-g32-asym", "W8A8", "W4A16-g-1"])
@pytest.mark.parametrize("name", NAMES)
def test_subnormal_scales_in_float16(name: str, scheme: str) -> None:
    """Small weights have such scales, and no backend may take them for zero."""
    spec = LinearSpec(QuantScheme.parse(scheme), 48, 96, torch.float16, DEVICE)
    backend = backend_for(name, spec)
    weight = method("rtn").quantize(torch.randn(48, 96, device=DEVICE) * 1e-4, spec.scheme, torch.float16)
    assert (weight.scale < torch.finfo(torch.float16).tiny).any()
    x = torch.randn(3, 96, dtype=torch.float16, device=DEVICE) * 1000
    y = backend.linear(x, backend.prepare(weight, spec), spec)
    expected = x.double() @ weight.dequantize(torch.float64).T
    assert (y.double() - expected).norm() < 0.02 * expected.norm()
