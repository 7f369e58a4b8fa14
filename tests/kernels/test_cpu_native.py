"""The compiled kernels for CPUs: every instruction set that is here, and what happens where they were not built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_quant.kernels import LinearSpec, cpu_native, select
from hf_quant.methods import method
from hf_quant.scheme import QuantScheme

SLUGS = (
    "W4A16-g32",
    "W4A16-g64-asym",
    "W4A16-g-1",
    "W8A16-g-1",
    "W8A16-g32-asym",
    "W3A16-g32",
    "W3A16-g32-asym",
    "W2A16-g32",
    "W2A16-g64-asym",
)
LIMITS = {
    "torch.float32": 1e-5,
    "torch.float16": 6e-4,
    "torch.bfloat16": 4e-3,
}  # of rounding the output, and W to bf16
built = pytest.mark.skipif(cpu_native._cpu is None, reason="not compiled")


@built
@pytest.mark.parametrize("level", cpu_native.LEVELS)
def test_every_instruction_set(level: str) -> None:
    here = Path(__file__).with_name("_cpu_levels.py")
    call = [sys.executable, "-W", "ignore", str(here), *SLUGS]
    done = subprocess.run(call, env=os.environ | {"HF_QUANT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["level"] in cpu_native.LEVELS[: cpu_native.LEVELS.index(level) + 1]  # or less, on lesser machines
    for dtype, limit in LIMITS.items():
        assert found["worst"][dtype] < limit, found


def test_an_unknown_instruction_set_is_refused() -> None:
    code = "import hf_quant.kernels.cpu_native"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HF_QUANT_CPU_LEVEL": "sse9"}, capture_output=True, text=True
    )
    assert done.returncode == (1 if cpu_native._cpu is not None else 0)
    assert cpu_native._cpu is None or "HF_QUANT_CPU_LEVEL must be one of" in done.stderr


def test_without_a_compiler_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native, "_cpu", None)
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
    tiles, scale, zero = backend.prepare(weight, spec)
    x = torch.randn(5, 64, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(cpu_native.cpu_native_linear, (x, tiles, scale, zero, 4, 48), test_utils=checks)
    grad = torch.randn(5, 48)
    backend.linear(x, (tiles, scale, zero), spec).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight.dequantize(torch.float32), rtol=1e-4, atol=1e-4)
    whole = torch.compile(lambda x: backend.linear(x, (tiles, scale, zero), spec), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x.detach()), backend.linear(x.detach(), (tiles, scale, zero), spec))
