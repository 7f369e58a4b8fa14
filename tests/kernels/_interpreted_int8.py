"""Run by test_int8.py in a process of its own, since TRITON_INTERPRET must be set before triton is imported.

fp16 and fp32 only: the interpreter computes bf16 silently wrong.
"""

import sys
from dataclasses import replace

import torch

from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels import LinearSpec
from hf_quant.kernels._shared import naive
from hf_quant.kernels.triton_int8 import BACKEND, triton_int8
from hf_quant.methods import method

SCHEMES = ["W8A8", "W8A8-static", "W8A8-o5%-columns", "W8A8-g64", "W4A8-g64", "W4A8-g128-asym", "W4A8-static-g64-o5%-columns", "W4A8"]  # fmt: skip
SHAPES = [(1, 16, 64), (3, 33, 128), (40, 65, 192), (17, 5, 384), (2, 70, 1184)]
torch.manual_seed(0)
original = torch.Tensor.new_empty


def poisoned(self, *args, **kwargs):
    """A store left out must show."""
    made = original(self, *args, **kwargs)
    return made.fill_(7777) if made.is_floating_point() else made.fill_(99)


def made(slug, n, k, dtype):
    scheme = QuantScheme.parse(slug).fitted(k)
    weight = method("rtn", steps=0).quantize(torch.randn(n, k), scheme, dtype)
    ranged = replace(weight, input_scale=torch.tensor([2.5 / 127], dtype=dtype))
    return ranged if scheme.activations == "tensor" else weight


torch.Tensor.new_empty = poisoned
done = 0
for slug in SCHEMES:
    for m, n, k in SHAPES:
        dtype = (torch.float16, torch.float32)[done % 2]
        weight = made(slug, n, k, dtype)
        spec = LinearSpec(weight.scheme, n, k, dtype, "cpu")
        if "groups of 64" in (BACKEND().why_not(spec) or ""):
            continue
        assert BACKEND().why_not(spec) is None
        x = torch.randn(m, k).to(dtype)
        x[-1] = 0
        got = BACKEND().linear(x, BACKEND().prepare(weight, spec), spec)
        wanted = naive.int8_linear(x, weight)  # ties of rounding are not met here
        error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
        assert got.dtype == dtype and error < (2e-3 if dtype is torch.float16 else 1e-5), (slug, m, n, k, error)
        assert not got[-1].any()
        done += 1
for bad in (torch.nan, torch.inf):  # a row that is not finite spoils itself and no other
    for m, slug in ((4, "W8A8"), (4, "W8A8-static"), (40, "W8A8"), (40, "W4A8-static-g64")):
        weight = made(slug, 33, 128, torch.float32)
        x, spec = torch.randn(m, 128), LinearSpec(weight.scheme, 33, 128, torch.float32, "cpu")
        x[1, 7] = bad
        got = BACKEND().linear(x, BACKEND().prepare(weight, spec), spec)
        assert not got[1].isfinite().any() and got[[0, *range(2, m)]].isfinite().all()
        done += 1

torch.Tensor.new_empty = original
checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
for slug, bits in (("W8A8-static-o5%-columns", 8), ("W4A8-g64-asym", 4)):
    weight = made(slug, 33, 128, torch.float32)
    index = None if weight.outliers is None else weight.outliers.index
    x = torch.randn(3, 128, requires_grad=True)
    parts = (weight.qweight, weight.scale, weight.zero_point, bits, index, weight.input_scale)
    torch.library.opcheck(triton_int8, (x, *parts), test_utils=checks)
    grad = torch.randn(3, 33)
    triton_int8(x, *parts).backward(grad)
    torch.testing.assert_close(x.grad, grad @ replace(weight, outliers=None).dequantize(), rtol=1e-4, atol=1e-4)
    assert triton_int8(x[:0], *parts).shape == (0, 33)
bf16 = LinearSpec(QuantScheme.parse("W8A8"), 32, 64, torch.bfloat16, "cpu")
assert "silently wrong" in (BACKEND().why_not(bf16) or "")
sys.stdout.write(f"{done} agree")
