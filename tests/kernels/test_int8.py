"""Layers with INT8 activations: the function all kernels compute, oneDNN's product, the Triton kernels, and what is refused."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_quant import _plugins, kernels
from hf_quant.core.numerics import quantize_rows
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels import LinearBackend, LinearSpec, outlier_linear, refusal, select
from hf_quant.kernels._native import compiled
from hf_quant.kernels._shared.rounded import RoundedPacked, RoundedViews, round_activations
from hf_quant.kernels.cpu_int8 import cpu_int8_linear
from hf_quant.kernels.cpu_native_int8 import cpu_native_int8_linear
from hf_quant.methods import method
from hf_quant.nn import QuantLinear

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLUGS = ["W8A8", "W8A8-static", "W8A8-o5%-columns", "W8A8-static-o5%-columns", "W8A8-o2%", "W8A8-threshold", "W8A8-g32", "W8A8-asym", "W4A8-g32", "W4A8-g64-asym", "W4A8-static-g32-o5%-columns"]  # fmt: skip
# a value halfway between two codes may go either way, where one kernel divides and another multiplies
DTYPES = {torch.float32: 5e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def layer(slug: str, n: int, k: int, dtype: torch.dtype) -> tuple[QuantizedTensor, LinearSpec]:
    scheme, stats = QuantScheme.parse(slug).fitted(k), InputStats.empty(k)
    stats.update(torch.randn(50, k) * torch.logspace(-1, 1, k))
    made = method("rtn", steps=0).quantize(torch.randn(n, k), scheme, dtype, stats)
    if scheme.activations == "tensor":
        made = replace(made, input_scale=torch.tensor([2.5 / 127], dtype=dtype))
    return made, LinearSpec(scheme, n, k, dtype, "cpu")


def expected(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """The whole product in float64: activations as the scheme rounds them, outliers of the weights as they are."""
    wide, scheme = x.double(), weight.scheme
    skip = torch.zeros(x.shape[-1], dtype=torch.bool)
    if weight.outliers is not None and scheme.outlier_columns:
        skip[weight.outliers.index.long()] = True
    if scheme.activations == "threshold":
        skip = (x.abs() >= 6).flatten(0, -2).any(0)
    codes, scale = quantize_rows(x.masked_fill(skip, 0), weight.input_scale)
    rounded = torch.where(skip, wide, codes.double() * scale.double())
    plain = replace(weight, outliers=None).dequantize(torch.float64)
    y = rounded @ plain.T
    if weight.outliers is not None:
        y += wide @ (weight.dequantize(torch.float64) - plain).T
    return y


def whole(backend: LinearBackend[Any], x: Tensor, weight: QuantizedTensor, spec: LinearSpec) -> Tensor:
    y = backend.linear(x, backend.prepare(weight, spec), spec)
    return y if weight.outliers is None else y + outlier_linear(x, weight.outliers.index, weight.outliers.value)


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory a kernel forgets to write is NaN, or codes of 99."""
    own = torch.Tensor.new_empty

    def made(*args: Any, **kwargs: Any) -> Tensor:
        tensor = own(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 99)

    monkeypatch.setattr(torch.Tensor, "new_empty", made)


def every(spec: LinearSpec) -> list[LinearBackend[Any]]:
    """All that run it here, and what does where no codes may move."""
    there = [_plugins.load("kernels", name).BACKEND() for name in _plugins.names("kernels")]
    return [*(b for b in there if refusal(b, spec) is None), select(spec), select(spec, repacking=False)]


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize(("n", "k"), [(48, 256), (33, 160), (5, 32), (1, 96), (130, 64)])
def test_the_kernel_chosen_here_equals_float64(slug: str, n: int, k: int, dtype: torch.dtype) -> None:
    weight, spec = layer(slug, n, k, dtype)
    tolerance = max(DTYPES[dtype], 1e-2 if weight.scheme.bits == 4 else 0)  # which meet bf16 activations on CPUs
    for backend in every(spec):
        for m in (0, 1, 3, 37, 200):
            x = (torch.randn(2, m, k) * 3).to(dtype)
            got = whole(backend, x, weight, spec)
            assert got.shape == (2, m, n) and got.dtype == dtype
            if m:
                wanted = expected(x, weight)
                assert (got - wanted).norm() / wanted.norm() < tolerance, (type(backend).__name__, m)


@pytest.mark.parametrize("slug", ["W8A8", "W8A8-static", "W8A8-o5%-columns", "W8A8-asym", "W4A8-g32", "W3A8-g32-asym", "W2A8-g32"])  # fmt: skip
def test_kernels_give_the_codes_back(slug: str) -> None:
    for n, k in ((1, 32), (33, 96), (64, 160), (130, 64)):
        weight, spec = layer(slug, n, k, torch.bfloat16)
        for backend in every(spec):
            if backend.repacks:
                assert torch.equal(backend.restore(backend.prepare(weight, spec), spec), weight.qweight)


@pytest.mark.parametrize("slug", ["W8A8", "W8A8-static", "W4A8-g32"])
def test_all_zeros_stay_zeros(slug: str) -> None:
    weight, spec = layer(slug, 33, 96, torch.float32)
    x = torch.randn(3, 96)
    x[1] = 0
    got = whole(select(spec), x, weight, spec)
    assert not got[1].any() and got.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("slug", ["W8A8", "W8A8-static", "W4A8-g32", "W4A8-static-g32", "W8A8-o5%-columns"])
def test_what_is_not_finite_spoils_its_row_and_no_other(slug: str, bad: float) -> None:
    weight, spec = layer(slug, 33, 96, torch.float32)
    for m in (3, 40):
        x = torch.randn(m, 96)
        x[1, 7] = bad
        got = whole(select(spec), x, weight, spec)
        assert not got[1].isfinite().any()
        assert got[[0, *range(2, m)]].isfinite().all()


@pytest.mark.parametrize("slug", ["W8A8", "W8A8-static-o5%-columns", "W8A8-threshold", "W4A8-g32"])
def test_gradients_pass_as_if_nothing_were_rounded(slug: str) -> None:
    weight, spec = layer(slug, 48, 96, torch.float32)
    x, grad = torch.randn(5, 96, requires_grad=True), torch.randn(5, 48)
    whole(select(spec), x, weight, spec).backward(grad)
    torch.testing.assert_close(
        x.grad, grad @ weight.dequantize(torch.float32), rtol=2e-2 if "W4" in slug else 1e-4, atol=1e-3
    )


def test_the_ops_are_well_formed() -> None:
    weight, _ = layer("W8A8-static-o5%-columns", 33, 96, torch.float32)
    assert weight.outliers is not None
    x, checks = torch.randn(5, 96, requires_grad=True), ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")  # fmt: skip
    codes = (weight.qweight ^ 0x80).view(torch.int8)
    args = (x, codes, weight.scale[:, 0].contiguous(), weight.outliers.index, weight.input_scale)
    torch.library.opcheck(cpu_int8_linear, args, test_utils=checks)
    columns, ranges = weight.outliers.index, weight.input_scale
    if compiled.built() in compiled.BYTES:
        w = compiled.laid_out(weight, LinearSpec(weight.scheme, 33, 96, torch.float32, "cpu"))
        args = (x, w.tiles, w.scale, None, columns, ranges, 8, 33)
        torch.library.opcheck(cpu_native_int8_linear, args, test_utils=checks)
    torch.library.opcheck(round_activations, (x, weight.outliers.index, None, 6.0), test_utils=checks)


def made_linear(slug: str) -> QuantLinear:
    weight, _ = layer(slug, 48, 96, torch.float32)
    linear = QuantLinear(96, 48, weight.scheme, bias=True, dtype=torch.float32)
    for name, tensor in _plugins.load("formats", "native").FORMAT().write(weight).items():
        getattr(linear, name).data = tensor
    linear.bias.data.normal_()
    linear.choose_kernel()
    return linear


@pytest.mark.parametrize("slug", ["W8A8", "W8A8-static-o5%-columns", "W4A8-g32"])
def test_a_layer_moves_copies_and_compiles(slug: str) -> None:
    linear, x = made_linear(slug), torch.randn(3, 7, 96)
    y = linear(x)
    for again in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert type(again._backend) is type(linear._backend) and torch.equal(again(x), y)
    assert torch.equal(torch.compile(linear, backend="aot_eager", fullgraph=True)(x), y)
    fresh = QuantLinear(96, 48, linear.scheme, bias=True, dtype=torch.float32)
    fresh.load_state_dict(linear.state_dict())
    fresh.choose_kernel()
    assert torch.equal(fresh(x), y)
    half = copy.deepcopy(linear).to(torch.bfloat16)
    assert (half(x.bfloat16()).float() - y).norm() < 2e-2 * y.norm()


def test_no_kernel_for_weights_alone_gets_such_a_layer() -> None:
    spec = LinearSpec(QuantScheme.parse("W8A8"), 64, 64, torch.bfloat16, "cpu")
    for name in _plugins.names("kernels"):
        backend = _plugins.load("kernels", name).BACKEND()
        int8 = getattr(backend, "int8_activations", False)
        assert int8 or refusal(backend, spec) == "activations stay in floating point there"
        assert not int8 or refusal(backend, replace(spec, scheme=spec.scheme.weights)) == "INT8 activations only"


def test_what_no_kernel_multiplies_is_rounded_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels._say.cache_clear()
    kernels._select.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_quant.kernels"):
        for n in (32, 64):
            spec = LinearSpec(QuantScheme.parse("W8A8-threshold"), n, 64, torch.float32, "cpu")
            assert isinstance(select(spec), (RoundedPacked, RoundedViews))
    assert len(caplog.records) == 1 and "W8A8-threshold on cpu: activations are rounded" in caplog.text
    monkeypatch.setenv("HF_QUANT_BACKEND", "reference")  # the oracle: rounded, then dequantized
    backend: Any = select(replace(spec, scheme=QuantScheme.parse("W8A8")))
    assert type(backend.inner).__name__ == "Reference"


def run(script: str, *args: str, **env: str) -> str:
    pytest.importorskip("triton")
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HERE / script, *args], capture_output=True, text=True, check=False, env=kept | env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_interpreted_triton_equals_float64() -> None:
    assert run("_interpreted_int8.py", TRITON_INTERPRET="1") == "44 agree"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_triton_compiles_to_integer_tensor_cores_without_spills(target: str, tmp_path: Path) -> None:
    rows = [
        json.loads(line) for line in run("_ahead_of_time_int8.py", target, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    ]
    assert len(rows) == 10
    for row in rows:
        assert row["spills"] == 0 and 0 < row["registers"] <= 255 and not row["float_mma"], row
        assert row["integer_mma"] > 0 or "rounds" in row, row
