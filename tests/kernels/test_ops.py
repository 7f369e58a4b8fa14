"""Operations given what they must not be given: each says what is wrong, or is right; none reads or writes what is not its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_quant import _plugins
from hf_quant.core.coded_scales import CodedScales
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import KernelError
from hf_quant.kernels import LinearSpec, outlier_linear, select
from hf_quant.kernels._native import compiled
from hf_quant.kernels._shared import ops
from hf_quant.kernels._triton.tiles import why_no_triton
from hf_quant.kernels.cpu_native import BACKEND as CpuNative
from tests.kernels.operations import K, M, N, arguments, called, checked, spec_of, weight

built = pytest.mark.skipif(compiled._cpu is None, reason="not compiled")


def spoilt(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What might be given in place of a tensor, all of it wrong."""
    axis = max(0, tensor.ndim - 2)
    yield "on another device", tensor.to("meta")
    yield "truth values", tensor.to(torch.bool)
    yield "complex", tensor.to(torch.complex64)
    yield "another axis", tensor[None]
    yield "without an axis", tensor[0]
    if tensor.dtype in (torch.int16, torch.int32) and tensor.min() >= 0:  # columns; not words of codes
        yield "far", torch.full_like(tensor, 30000)
        yield "negative", torch.full_like(tensor, -3)
    if tensor.ndim > 1 or tensor.dtype not in (torch.int16, torch.int32):  # of columns there may be any number
        yield "short", tensor.narrow(axis, 0, tensor.shape[axis] // 2)
        yield "empty", tensor.narrow(axis, 0, 0)
        yield "long", torch.cat([tensor, tensor], axis)


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.7 and older bring along one without the settings that the kernels ask for."""
    old = ModuleType("triton")
    old.__spec__, old.__version__ = ModuleSpec("triton", None), "3.3.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", old)
    why_no_triton.cache_clear()
    try:
        spec = LinearSpec(QuantScheme.parse("W4A16-g32"), 64, 64, torch.float32, "cuda")
        assert "3.3.1 is older than 3.4" in str(_plugins.load("kernels", "triton_wna16").BACKEND().why_not(spec))
    finally:
        why_no_triton.cache_clear()


def test_every_operation_is_in_the_table() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hf_quant::")}
    there = {name for name in ops.TABLE if not name.startswith("triton") or why_no_triton() is None}
    assert registered == {f"hf_quant::{name}" for name in there} and ops.OPS.keys() == there


def test_an_operation_is_implemented_as_the_table_says() -> None:
    with pytest.raises(TypeError, match="outlier_rows: its arguments are x, index, value"):
        ops.implements("outlier_rows")(lambda x, value, index: x)


@pytest.mark.parametrize("name", sorted(ops.OPS))
def test_what_must_not_be_given(name: str) -> None:
    if name.startswith("cpu_native") and compiled._cpu is None:
        pytest.skip("not compiled")
    args = arguments(name)
    call = called(name)
    right = call(*args)
    for at, arg in enumerate(args):
        if not isinstance(arg, Tensor) or (arg.dtype is torch.int32 and arg.ndim == 1):  # counters: any number of them
            continue
        for what, other in spoilt(arg):
            if at == 0 and what in ("short", "empty", "long"):
                continue  # another number of rows
            if name.startswith("triton_wna16") and arg.dtype is torch.int16 and what == "without an axis":
                continue  # whole columns
            if name == "cpu_native_linear_backward" and (at, what) == (1, "long"):
                continue  # more columns, in groups of twice as many
            with pytest.raises(KernelError, match=f"^{name}: ") as error:
                call(*args[:at], other, *args[at + 1 :])
                pytest.fail(f"argument {at}, {what}")
            assert len(str(error.value)) < 300
        strided = torch.stack([arg, arg], -1)[..., 0]
        try:
            got = call(*args[:at], strided, *args[at + 1 :])
        except KernelError as refused:
            assert "is not contiguous" in str(refused)
        else:
            assert right is None or torch.equal(got, right)


@pytest.mark.parametrize(
    ("name", "at", "wrong", "message"),
    [
        ("codebook_linear_backward", 1, None, "qweight is None, must be a tensor"),
        ("dequant_linear", 2, None, "scale is None, must be a tensor"),
        ("outlier_rows_backward", 3, 2**62, "k must be from 1 to 2147483647, got 4611686018427387904"),
        ("outlier_rows_backward", 3, 0, "k must be from 1 to"),
        ("triton_wna16_backward", 8, 0, "k must be from 1 to"),
        ("triton_experts_backward", 9, 2**62, "k must be from 1 to"),
        ("cpu_int4_linear", 6, 2**40, "fixed must be from 0 to 255, got 1099511627776"),
        ("cpu_int4_linear_backward", 4, -1, "fixed must be from 0 to 255, got -1"),
        ("round_activations", 3, float("nan"), "threshold must be 0 or above, got nan"),
        ("round_activations", 3, -1.0, "threshold must be 0 or above, got -1.0"),
    ],
)
def test_no_tensor_and_numbers_out_of_range(name: str, at: int, wrong: Any, message: str) -> None:
    args = arguments(name)
    with pytest.raises(KernelError, match=f"^{name}: {message}"):
        called(name)(*args[:at], wrong, *args[at + 1 :])


def test_planes_of_no_columns() -> None:
    x, *rest = arguments("triton_wna16", "W4A16-g-1")
    with pytest.raises(KernelError, match="columns of x must be from 1 to 2147483647, got 0"):
        checked("triton_wna16")(x[:, :0], *rest)


@pytest.mark.parametrize("name", ["cpu_int8_linear", "cpu_int8_linear_backward"])
def test_a_packed_weight_of_other_numbers(name: str) -> None:
    first, packed, *rest = arguments(name)
    with pytest.raises(KernelError, match=f"^{name}: packed is torch.float32"):
        ops.OPS[name](first, packed.T.float().contiguous().to_mkldnn(), *rest)


@built
def test_a_gradient_without_columns() -> None:
    grad, *rest = arguments("cpu_native_linear_backward")
    with pytest.raises(KernelError, match="grad has no columns"):
        torch.ops.hf_quant.cpu_native_linear_backward(grad[:, :0], *rest)


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 10**6}, r"tiles has shape \[3, 4, 256\], must be \[ceil\(N / 16\), K / 32, 64 bits\] = \[62500, 4, 256\]"),
        ({"n": N + 16}, "tiles has shape"), ({"n": 0}, "n must be at least 1"), ({"n": -16}, "n must be at least 1"),
        ({"bits": 9}, "bits must be one of 2, 3, 4, 5, 6, 7, 8, got 9"), ({"bits": 0}, "bits must be one of"),
        ({"bits": 8}, "tiles has shape"), ({"bits": 2}, "tiles has shape"),
        ({"scale": lambda s: s.double()}, "scale is float64, must be one of float32, bfloat16, float16"),
        ({"scale": lambda s: s.byte()}, "scale is uint8, must be one of float32"),
        ({"scale": lambda s: s.transpose(1, 2).contiguous().transpose(1, 2)}, "scale is not contiguous"),
        ({"scale": lambda s: s[:, :1].expand(-1, 16, -1)}, "scale has 16 groups, 128 columns cannot"),
        ({"scale": lambda s: s[:, :1].expand(-1, 3, -1)}, "scale has 3 groups, 128 columns cannot"),
        ({"scale": lambda s: s[:, :0]}, "scale has 0 groups"),
        ({"tiles": lambda t: t[:0]}, "tiles has shape"), ({"tiles": lambda t: t.int()}, "tiles is int32"),
        ({"zero": lambda z: z.double()}, "zero is float64, must be one of uint8, float32, bfloat16, float16"),
        ({"x": lambda x: x.long()}, "x is int64"), ({"x": lambda x: x.to(torch.uint8)}, "x is uint8"),
        ({"x": lambda x: x.to(torch.float8_e4m3fn)}, "x is float8_e4m3fn"),
        ({"x": lambda x: x.to("meta")}, "tensors are on cpu and meta"),
        ({"x": lambda x: x.to_sparse()}, "x is torch.sparse_coo|SparseCPU"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("int8", [False, True])
def test_the_compiled_products(int8: bool, change: dict[str, Any], message: str) -> None:
    if int8 and compiled.built() not in compiled.BYTES:
        pytest.skip("no products of bytes")
    op = ops.OPS["cpu_native_int8_linear" if int8 else "cpu_native_linear"]
    more = ["columns", "ranges"] if int8 else ["unit", "zero_unit", "subtracted"]
    names = ["x", "tiles", "scale", "zero", *more, "bits", "n"]
    given = dict(zip(names, arguments(op._name), strict=True))
    for name, what in change.items():
        given[name] = what(given[name]) if callable(what) else what
    with pytest.raises((KernelError, NotImplementedError), match=message):
        op(*given.values())


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": None}, "scale is uint8, must be one of float32"),
        ({"zero_unit": None}, "zero must have zero_unit, and be subtracted"),
        ({"subtracted": False}, "zero must have zero_unit, and be subtracted"),
        ({"zero": lambda z: z.float()}, "zero is float32, must be one of uint8"),
        ({"unit": lambda u: u.half()}, "unit is float16, must be one of float32"),
        ({"unit": lambda u: u[:, :0]}, "unit has 0 parts, 16 groups cannot be shared out"),
        ({"unit": lambda u: torch.cat([u, u[:, :1]], 1)}, "unit has 3 parts, 16 groups cannot be shared out"),
        ({"zero_unit": lambda u: u[:, :1]}, "zero_unit has shape"),
    ],
)
def test_the_compiled_product_in_two_levels(change: dict[str, Any], message: str) -> None:
    scheme = QuantScheme.parse("Q4_K")
    code = torch.randint(1, 64, (N, 16)).byte()
    coded = CodedScales(code, torch.rand(N, 2).half(), code, torch.rand(N, 2).half())
    w = QuantizedTensor.from_coded(torch.randint(256, (N, 256), dtype=torch.uint8), coded, scheme)
    names = ["tiles", "scale", "zero", "unit", "zero_unit", "subtracted"]
    given = dict(zip(names, CpuNative().prepare(w, spec_of(w)).operands, strict=True))
    x = torch.randn(M, 512).bfloat16()
    right = torch.ops.hf_quant.cpu_native_linear(x, *given.values(), 4, N)
    torch.testing.assert_close(right.double(), x.double() @ w.dequantize(torch.float64).T, rtol=0.02, atol=0.05)
    for name, what in change.items():
        given[name] = what(given[name]) if callable(what) else what
    with pytest.raises(KernelError, match=message):
        torch.ops.hf_quant.cpu_native_linear(x, *given.values(), 4, N)


@built
@pytest.mark.parametrize("columns", [[5, 30000], [-30000], [2**30], [2**33 + 3]])
@pytest.mark.parametrize("backend", ["cpu_native_int8", "cpu_int8"])
def test_columns_that_are_not_there(backend: str, columns: list[int]) -> None:
    name = f"{backend}_linear"
    args = list(arguments(name))
    place = next(i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.dtype is torch.int16)
    args[place] = torch.tensor(columns)
    with pytest.raises(KernelError, match=f"{name}: columns names column {columns[-1]}, there are columns 0 to 127"):
        ops.OPS[name](*args)


@built
@pytest.mark.skipif(compiled.built() not in compiled.BYTES, reason="no products of bytes")
def test_the_module_holds_columns_and_scales_against_bounds_itself() -> None:
    """What was laid out before anything was checked, or was changed in place since, writes nowhere else."""
    w = weight("W8A8-g32")
    p = CpuNative().prepare(w, spec_of(replace(w, scheme=w.scheme.weights)))
    x, y, told = torch.randn(1, K), torch.zeros(1, N), p.description

    def call(columns: list[int], fixed: float | None) -> None:
        index, range_ = torch.tensor(columns, dtype=torch.int32), torch.tensor([fixed or 1.0])
        compiled._cpu.int8_linear(
            told,
            x.data_ptr(),
            y.data_ptr(),
            0,
            1,
            1,
            index.data_ptr(),
            len(columns),
            range_.data_ptr() if fixed else 0,
        )

    call([0, K - 1], 0.1)
    for columns in ([K], [-1], [2**30], [0, 5, -(2**31)]):
        with pytest.raises(ValueError, match=f"outlier column {columns[-1]}: there are columns 0 to 127"):
            call(columns, None)
    for fixed in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be a finite number above 0"):
            call([], fixed)


@built
def test_the_module_takes_no_impossible_weight() -> None:
    q, s = torch.zeros(1, 4, 256, dtype=torch.uint8), torch.ones(1, 4, 16)
    x, y = torch.ones(1, K), torch.zeros(1, 16)
    right = {"q": q.data_ptr(), "scale": s.data_ptr(), "zero": 0, "type": 0, "bits": 4, "n": 16, "k": K, "group": 32,
             "unit": 0, "zero_unit": 0, "shift": 0, "zero type": 0, "subtracted": 0}  # fmt: skip
    wrong = [
        {"bits": 9},
        {"bits": 0},
        {"n": 0},
        {"k": 0},
        {"group": 0},
        {"group": 48},
        {"group": 16},
        {"type": 5},
        {"type": -1},
        {"type": 3},
        {"type": 4, "zero": s.data_ptr()},
        {"zero": s.data_ptr(), "zero type": 4},
        {"zero": s.data_ptr(), "zero type": 3, "subtracted": 1},
        {"zero_unit": s.data_ptr()},
        {"type": 2, "unit": s.data_ptr()},
        {"type": 3, "unit": s.data_ptr(), "shift": 3},
        {"type": 3, "unit": s.data_ptr(), "zero": s.data_ptr()},
        {"q": 0},
    ]
    for change in ({}, *wrong):
        told = torch.tensor(list((right | change).values()), dtype=torch.int64).numpy().tobytes()
        if change:
            with pytest.raises(ValueError, match="no weight has"):
                compiled._cpu.linear(told, x.data_ptr(), y.data_ptr(), 0, 1, 1)
        else:
            compiled._cpu.linear(told, x.data_ptr(), y.data_ptr(), 0, 1, 1)
    for bits, n, k in ((9, 16, K), (4, 0, K), (4, 16, 33), (4, -1, K)):
        with pytest.raises(ValueError, match="pack: no weight has"):
            compiled._cpu.pack(q.data_ptr(), q.data_ptr(), bits, n, k, 1)


@pytest.mark.parametrize("slug", ["W4A16-g32", "W8A8", "W4A16-g32-nf4", "W8A8-o5%-columns", "W4A16-g16"])
def test_inputs_that_no_layer_takes(slug: str) -> None:
    """Through the backend that is chosen, as a module calls it; an input on another device once ended the process."""
    scheme = QuantScheme.parse(slug).fitted(K)
    w = weight(str(replace(scheme, outliers=0.0, outlier_columns=False)))
    w = replace(w, scheme=replace(scheme, outliers=0.0, outlier_columns=False))
    backend, spec = select(spec_of(w)), spec_of(w)
    prepared, x = backend.prepare(w, spec), torch.randn(M, K).bfloat16()
    assert backend.linear(x, prepared, spec).shape == (M, N)
    wrong = {
        "meta": x.to("meta"),
        "integers": x.long(),
        "bytes": x.to(torch.uint8),
        "narrow": x[:, :64],
        "number": x[0, 0],
    }
    for name, other in wrong.items():
        with pytest.raises(KernelError, match=r"x is |columns|tensors are on"):
            backend.linear(other, prepared, spec)
            pytest.fail(name)


@pytest.mark.parametrize("slug", ["W4A16-g32", "W8A8"])
def test_negated_and_strided_inputs(slug: str) -> None:
    w = weight(slug)
    backend, spec = select(spec_of(w)), spec_of(w)
    prepared, x = backend.prepare(w, spec), torch.randn(M, K).bfloat16()
    right = backend.linear(x, prepared, spec)
    assert torch.equal(backend.linear(torch._neg_view(-x), prepared, spec), right)
    assert torch.equal(backend.linear(torch.stack([x, x], -1)[..., 0], prepared, spec), right)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, which it meets on its way to jvp
def test_forward_mode_differentiation_is_refused_and_not_forgotten() -> None:
    w = weight(dtype=torch.float32)
    x, direction = torch.randn(M, K), torch.randn(M, K)
    index, value = torch.zeros(N, 1, dtype=torch.int16), torch.randn(N, 1)
    for name in ("cpu_native", "dequant") if compiled._cpu else ("dequant",):
        backend, spec = _plugins.load("kernels", name).BACKEND(), spec_of(w)
        prepared = backend.prepare(w, spec)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, direction)
            with pytest.raises(KernelError, match="forward-mode differentiation"):
                backend.linear(dual, prepared, spec)
            with pytest.raises(KernelError, match="forward-mode differentiation"):
                torch.ops.hf_quant.dequant_linear(dual, w.qweight, w.scale, None, 4)
            with pytest.raises(KernelError, match="forward-mode differentiation"):
                outlier_linear(dual, index, value)
            backend.linear(x, prepared, spec)  # which has no tangent
        with pytest.raises(KernelError, match="forward-mode differentiation"):
            torch.func.jvp(lambda x: backend.linear(x, prepared, spec), (x,), (direction,))  # noqa: B023


@built
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory it uses")
@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer itself ends a process out of memory"
)
def test_memory_that_runs_out_is_an_error_and_not_the_end() -> None:
    code = """
import resource, torch
from hf_quant.kernels import LinearSpec, cpu_native
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
torch.set_num_threads(1)
k = 1 << 20
scheme = QuantScheme(4, -1)
weight = QuantizedTensor(torch.zeros(1, k // 2, dtype=torch.uint8), torch.ones(1, 1), None, scheme)
spec, backend = LinearSpec(scheme, 1, k, torch.float32, "cpu"), cpu_native.BACKEND()
prepared, x = backend.prepare(weight, spec), torch.ones(15, k)
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), hard))
try:
    backend.linear(x, prepared, spec)
except MemoryError:
    print("refused")
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
print(float(backend.linear(x, prepared, spec).sum()))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["refused", str(float(-8 * (1 << 20) * 15))], done
