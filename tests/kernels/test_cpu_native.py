"""The compiled kernels for CPUs: every instruction set that is here, and what happens where they were not built."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_quant.core.coded_scales import CodedScales
from hf_quant.core.numerics import quantize_rows
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import BackendError
from hf_quant.kernels import LinearSpec, cpu_native, cpu_native_int8, prepared_tensors, select
from hf_quant.kernels._native import compiled
from hf_quant.methods import method

SLUGS = (
    "W4A16-g32",
    "W4A16-g64-asym",
    "W4A16-g128",
    "W4A16-g32-asym-real",
    "W4A16-g-1",
    "W8A16-g-1",
    "W8A16-g32-asym",
    "W3A16-g32",
    "W3A16-g32-asym",
    "W2A16-g32",
    "W2A16-g64-asym",
    "W5A16-g64-asym",
    "W6A16-g32",
    "W7A16-g128",
    "W8A8",
    "W8A8-static-o5%-columns",
    "W8A8-g32-asym",
    "W4A8-g32",
    "W4A8-g64-asym",
    "W4A8-g128",
    "W3A8-g32",
    "W2A8-g64",
)
LIMITS = {
    "torch.float32": 1e-5,
    "torch.float16": 6e-4,
    "torch.bfloat16": 4e-3,
}  # of rounding the output, and W to bf16
built = pytest.mark.skipif(compiled._cpu is None, reason="not compiled")


@built
@pytest.mark.parametrize("level", compiled.LEVELS)
def test_every_instruction_set(level: str) -> None:
    here = Path(__file__).with_name("_cpu_levels.py")
    call = [sys.executable, "-W", "ignore", str(here), *SLUGS]
    done = subprocess.run(call, env=os.environ | {"HF_QUANT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["level"] in compiled.LEVELS[: compiled.LEVELS.index(level) + 1]  # or less, on lesser machines
    for dtype, limit in LIMITS.items():
        assert found["worst"][dtype] < limit, found
        assert found["worst_gradient"][dtype] < limit, found
        assert found["worst_int8"][dtype] < 1e-2, found  # halfway between two codes it may go either way


@built
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 6])
def test_a_few_huge_activations_cost_the_others_nothing(dtype: torch.dtype, m: int) -> None:
    """Where the codes mean zero, as under outliers kept apart, what is left must still be right."""
    codes = torch.randint(16, (48, 512), dtype=torch.uint8)
    codes[:, ::128] = 8
    weight = QuantizedTensor.from_codes(codes, torch.ones(48, 4), torch.full((48, 4), 8.0), QuantScheme(4, 128))
    spec = LinearSpec(weight.scheme, 48, 512, dtype, "cpu")
    backend = cpu_native.BACKEND()
    x = torch.randn(m, 512).to(dtype)
    x[:, ::128] *= 500
    got = backend.linear(x, backend.prepare(weight, spec), spec)
    expected = x.double() @ weight.dequantize(torch.float64).T
    assert (got - expected).norm() / expected.norm() < LIMITS[str(dtype)]


@pytest.fixture(params=compiled.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set after the other, or less, on lesser machines."""
    before = compiled._cpu.level()
    compiled._cpu.limit(request.param)
    yield request.param
    compiled._cpu.limit(before)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [3, 19])
@pytest.mark.usefixtures("level")
def test_what_is_not_finite_and_what_is_tiny(dtype: torch.dtype, m: int) -> None:
    scheme = QuantScheme(4, 32, symmetric=False)
    weight = method("rtn", steps=0).quantize(torch.randn(20, 64), scheme, dtype)
    backend, spec = cpu_native.BACKEND(), LinearSpec(scheme, 20, 64, dtype, "cpu")
    prepared = backend.prepare(weight, spec)
    x = torch.randn(m, 64).to(dtype)
    x[0, 5], x[1, 40] = torch.inf, torch.nan
    got = backend.linear(x, prepared, spec)
    assert not got[:2].isfinite().any() and got[2:].isfinite().all()
    assert torch.equal(backend.linear(torch.zeros_like(x), prepared, spec), torch.zeros(m, 20, dtype=dtype))
    if dtype is torch.bfloat16:  # whose exponents are those of float32
        tiny = torch.randn(m, 64).to(dtype) * 2.0**-110
        expected = tiny.double() @ weight.dequantize(torch.float64).T
        assert (backend.linear(tiny, prepared, spec) - expected).norm() / expected.norm() < LIMITS[str(dtype)]


def coded(slug: str, n: int, k: int) -> QuantizedTensor:
    """A weight with scales in two levels."""
    scheme = QuantScheme.parse(slug)
    scales, offsets = (torch.randint(1, 64, (n, scheme.groups(k)), dtype=torch.uint8) for _ in range(2))
    scale, offset = (torch.rand(n, scheme.units(k)).half() + 0.1 for _ in range(2))
    packed = torch.randint(256, (n, scheme.packed_bytes(k)), dtype=torch.uint8)
    return QuantizedTensor.from_coded(packed, CodedScales(scales & 15, scale, offsets & 15, offset), scheme)


@built
@pytest.mark.parametrize(
    ("slug", "n", "k"),
    [
        ("W4A16-g64-asym", 145, 576),
        ("W8A16-g-1-asym", 145, 576),
        ("W3A16-g32", 145, 576),
        ("W4A16-g128", 81, 1152),
        ("Q4_K", 145, 768),
        ("Q5_K", 33, 1280),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("level")
def test_prompts_in_several_passes_on_widths_that_fill_no_chunk(slug: str, n: int, k: int, dtype: torch.dtype) -> None:
    scheme = QuantScheme.parse(slug)
    two_levels = scheme.scale_bits is not None
    weight = (
        coded(slug, n, k) if two_levels else method("rtn", steps=0).quantize(torch.randn(n, k) + 0.1, scheme, dtype)
    )
    backend, spec = cpu_native.BACKEND(), LinearSpec(scheme, n, k, dtype, "cpu")
    prepared, dense = backend.prepare(weight, spec), weight.dequantize(torch.float64).T
    for m in (9, 16, 33, 70, 515):
        x = torch.randn(m, k).to(dtype)
        got, expected = backend.linear(x, prepared, spec), x.double() @ dense
        assert float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 2 * LIMITS[str(dtype)], m


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slug", ["W8A8", "W4A8-g64-asym", "W4A8-g32", "W3A8-g64", "W8A8-static"])
@pytest.mark.parametrize("m", [7, 33, 513])
def test_prompts_in_int8_on_widths_that_fill_no_chunk(slug: str, m: int, dtype: torch.dtype) -> None:
    scheme = QuantScheme.parse(slug)
    weight = method("rtn", steps=0).quantize(torch.randn(145, 576) + 0.1, scheme, dtype)
    if scheme.activations == "tensor":
        weight = replace(weight, input_scale=torch.tensor([2.5 / 127], dtype=dtype))
    backend, spec = cpu_native_int8.BACKEND(), LinearSpec(scheme, 145, 576, dtype, "cpu")
    if reason := backend.why_not(spec):
        pytest.skip(reason)
    x = torch.randn(m, 576).to(dtype)
    codes, scale = quantize_rows(x, weight.input_scale)
    expected = codes.double() * scale.double() @ weight.dequantize(torch.float64).T
    got = backend.linear(x, backend.prepare(weight, spec), spec)
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.median()) < 2 * LIMITS[str(dtype)]
    assert float(error.max()) < 1e-2  # of an activation halfway between two integers, rounded to the other one
    x[m - 2, 5], x[m - 1, 40] = torch.inf, torch.nan
    got = backend.linear(x, backend.prepare(weight, spec), spec)
    assert not got[m - 2 :].isfinite().any() and got[: m - 2].isfinite().all()


@built
def test_codes_in_large_pages_are_those_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = QuantScheme(4, 128)
    codes = torch.randint(16, (4100, 1152), dtype=torch.uint8)  # 2.3 MB, and scales that end within a block of rows
    weight = QuantizedTensor.from_codes(codes, torch.rand(4100, 9), None, scheme)
    spec = LinearSpec(scheme, 4100, 1152, torch.float32, "cpu")
    large = compiled.laid_out(weight, spec)
    parts = list(prepared_tensors(large))
    assert len(parts) == 2 and all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)  # as on other systems
    small = compiled.laid_out(weight, spec)
    assert all(torch.equal(one, other) for one, other in zip(parts, prepared_tensors(small), strict=True))
    assert torch.equal(compiled.portable(large.tiles, spec), weight.qweight)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages on this system")
@pytest.mark.skipif(os.environ.get("HF_QUANT_LARGE_PAGES") == "0", reason="large pages are switched off")
def test_pieces_of_large_pages_lie_apart_and_go_with_the_last() -> None:
    room = compiled._Room()
    pieces = [room.take(size) for size in (100, 3, compiled.MAPPED - 1000, 5000, compiled.MAPPED + 1)]
    for i, piece in enumerate(pieces):
        piece.fill_(i)
    assert all(bool((piece == i).all()) for i, piece in enumerate(pieces))
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)
    assert room.last() is not None
    del piece, pieces[-1]
    assert room.last() is None  # nothing but its pieces keeps a mapping
    assert bool((pieces[0] == 0).all())


@built
@pytest.mark.parametrize("slug", ["W4A16-g32", "W8A8"])
def test_any_number_of_threads_gives_the_same(slug: str) -> None:
    scheme = QuantScheme.parse(slug).fitted(256)
    weight = method("rtn", steps=0).quantize(torch.randn(3000, 256), scheme, torch.bfloat16, None)
    spec, before, found = LinearSpec(scheme, 3000, 256, torch.bfloat16, "cpu"), torch.get_num_threads(), []
    backend = select(spec)
    prepared, x = backend.prepare(weight, spec), torch.randn(40, 256).bfloat16()
    try:
        for threads in (1, 2, 3, 70):  # 70: more than the shares that work is divided into
            torch.set_num_threads(threads)
            found.append([backend.linear(x[:m], prepared, spec) for m in (1, 2, 9, 40)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@built
@pytest.mark.parametrize("slug", ["W4A16-g32", "W8A8"])
def test_rows_of_any_shape_and_none_of_another_width(slug: str) -> None:
    scheme = QuantScheme.parse(slug).fitted(64)
    weight = method("rtn", steps=0).quantize(torch.randn(20, 64), scheme, torch.bfloat16, None)
    spec = LinearSpec(scheme, 20, 64, torch.bfloat16, "cpu")
    backend = select(spec)
    prepared, x = backend.prepare(weight, spec), torch.randn(6, 64).bfloat16()
    flat = backend.linear(x, prepared, spec)
    w = prepared.weight if slug == "W8A8" else prepared
    for shape in ((6, 64), (1, 6, 64), (2, 3, 64), (3, 1, 2, 64)):
        y = backend.linear(x.view(shape), prepared, spec)
        assert y.is_contiguous() and torch.equal(y, flat.view(*shape[:-1], 20))
    assert backend.linear(x[0], prepared, spec).shape == (20,)
    assert backend.linear(x[:0], prepared, spec).shape == (0, 20)
    assert torch.equal(backend.linear(x.t().contiguous().t(), prepared, spec), flat)
    for other in (x[:, :32], torch.randn(6, 65).bfloat16()):
        with pytest.raises(RuntimeError, match=f"x has {other.shape[1]} columns, the weight has 64"):
            backend.linear(other, prepared, spec)
        with pytest.raises(RuntimeError, match=f"x has {other.shape[1]} columns, the weight has 64"):  # the op itself
            if slug == "W8A8":
                cpu_native_int8.cpu_native_int8_linear(other, w.tiles, w.scale, None, None, None, 8, 20)
            else:
                cpu_native.cpu_native_linear(other, *w.operands, 4, 20)


@built
def test_the_module_takes_no_other_bytes_for_a_weight() -> None:
    for wrong in (b"", bytes(63), 5):
        with pytest.raises(TypeError, match="linear takes a weight of 104 bytes first"):
            compiled._cpu.linear(wrong, 0, 0, 0, 0, 0)  # type: ignore[arg-type]


def test_an_unknown_instruction_set_is_refused() -> None:
    code = "import hf_quant.kernels._native.compiled"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HF_QUANT_CPU_LEVEL": "sse9"}, capture_output=True, text=True
    )
    assert done.returncode == (1 if compiled._cpu is not None else 0)
    assert compiled._cpu is None or "HF_QUANT_CPU_LEVEL must be one of" in done.stderr


def test_without_a_compiler_pytorch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "_cpu", None)
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "hf_quant/kernels/_native/compiled.py"))  # as installed
    spec = LinearSpec(QuantScheme(4, 32), 64, 128, torch.bfloat16, "cpu")
    assert "no C++ compiler" in (cpu_native.BACKEND().why_not(spec) or "")
    select.__globals__["_select"].cache_clear()
    assert type(select(spec)).__name__ == "CpuInt4"
    select.__globals__["_select"].cache_clear()


@built
def test_the_op_is_well_formed() -> None:
    scheme = QuantScheme(4, 32, symmetric=False)
    weight = method("rtn", steps=0).quantize(torch.randn(48, 64), scheme, torch.float32)
    backend, spec = cpu_native.BACKEND(), LinearSpec(scheme, 48, 64, torch.float32, "cpu")
    w = backend.prepare(weight, spec)
    x = torch.randn(5, 64, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(cpu_native.cpu_native_linear, (x, *w.operands, 4, 48), test_utils=checks)
    grad = torch.randn(5, 48)
    backend.linear(x, w, spec).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight.dequantize(torch.float32), rtol=1e-4, atol=1e-4)
    whole = torch.compile(lambda x: backend.linear(x, w, spec), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x.detach()), backend.linear(x.detach(), w, spec))


def test_a_module_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "digest", lambda: "0123456789abcdef")
    compiled.check_sources(SimpleNamespace(sources=lambda: "0123456789abcdef"))
    for module in (SimpleNamespace(sources=lambda: "fedcba9876543210"), SimpleNamespace()):  # the latter is older
        with pytest.raises(BackendError, match=r"pip install -e \. there again"):
            compiled.check_sources(module)
    monkeypatch.setattr(compiled, "digest", lambda: None)  # a wheel has no sources
    compiled.check_sources(SimpleNamespace())
