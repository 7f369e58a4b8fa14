"""Run by test_triton.py in a process of its own, since TRITON_INTERPRET must be set before triton is imported.

fp16 and fp32 only: the interpreter computes bf16 silently wrong.
"""

import sys

import torch

from hf_quant.kernels import LinearSpec, outlier_linear
from hf_quant.kernels._outliers import _on_gpu
from hf_quant.kernels.triton_codebook import BACKEND as CODEBOOK
from hf_quant.kernels.triton_codebook import triton_codebook
from hf_quant.kernels.triton_wna16 import BACKEND, triton_wna16
from hf_quant.methods import method
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import QuantizedTensor

SHAPES = [(1, 16, 64, 32), (3, 33, 96, 16), (40, 65, 160, -1), (2, 5, 128, 128)]
torch.manual_seed(0)
original = torch.Tensor.new_empty


def poisoned(self, *args, **kwargs):
    """A store left out must show."""
    made = original(self, *args, **kwargs)
    return made.fill_(7777) if made.is_floating_point() else made


torch.Tensor.new_empty = poisoned
done = 0
for bits in (2, 3, 4, 8):
    for m, n, k, group in SHAPES:
        for symmetric in (True, False):
            dtype = (torch.float16, torch.float32)[done % 2]
            scheme = QuantScheme(bits, group, symmetric)
            weight = method("rtn", steps=0).quantize(torch.randn(n, k), scheme, dtype)
            x = torch.randn(m, k).to(dtype)
            spec = LinearSpec(scheme, n, k, dtype, "cpu")
            backend = BACKEND()
            assert backend.why_not(spec) is None
            got = backend.linear(x, backend.prepare(weight, spec), spec)
            expected = x.double() @ weight.dequantize(torch.float64).T
            error = (got.double() - expected).norm() / expected.norm()
            assert got.dtype == dtype and error < (2e-3 if dtype is torch.float16 else 1e-5), (spec, error)
            done += 1
for m, n, k, r in ((1, 16, 64, 1), (3, 300, 96, 2), (40, 65, 160, 5), (5, 7, 32, 32)):
    dtype = (torch.float16, torch.float32)[done % 2]
    x, index, value = torch.randn(m, k).to(dtype), torch.rand(n, k).topk(r).indices.int(), torch.randn(n, r).to(dtype)
    assert _on_gpu(x)
    got = outlier_linear(x, index, value)
    expected = x.double() @ torch.zeros(n, k, dtype=torch.float64).scatter_(1, index.long(), value.double()).T
    assert got.dtype == dtype and (got - expected).norm() / expected.norm() < (
        2e-3 if dtype is torch.float16 else 1e-5
    )
    done += 1
for slug in ("-nf4", "-fp4", "-asym-real"):
    for m, n, k, group in SHAPES:
        dtype = (torch.float16, torch.float32)[done % 2]
        scheme = QuantScheme.parse(f"W4A16-g{group}{slug}")
        scale = torch.rand(n, scheme.groups(k)) + 0.1
        zero = (torch.rand_like(scale) * 15).to(dtype) if scheme.real_zero else None
        weight = QuantizedTensor(torch.randint(256, (n, k // 2), dtype=torch.uint8), scale, zero, scheme)
        x, spec = torch.randn(m, k).to(dtype), LinearSpec(scheme, n, k, dtype, "cpu")
        backend = (CODEBOOK if scheme.codebook else BACKEND)()
        assert backend.why_not(spec) is None
        got = backend.linear(x, backend.prepare(weight, spec), spec)
        expected = x.double() @ weight.dequantize(torch.float64).T
        error = (got.double() - expected).norm() / expected.norm()
        assert got.dtype == dtype and error < (2e-3 if dtype is torch.float16 else 1e-5), (spec, error)
        done += 1
bf16 = LinearSpec(QuantScheme(4, 32), 32, 64, torch.bfloat16, "cpu")
assert "silently wrong" in (BACKEND().why_not(bf16) or "")

torch.Tensor.new_empty = original
weight = method("rtn", steps=0).quantize(torch.randn(33, 64), QuantScheme(3, 32, False), torch.float32)
x = torch.randn(3, 64, requires_grad=True)
parts = (weight.qweight, weight.scale, weight.zero_point)
checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
torch.library.opcheck(triton_wna16, (x, *parts, 3), test_utils=checks)
grad = torch.randn(3, 33)
triton_wna16(x, *parts, 3).backward(grad)
torch.testing.assert_close(x.grad, grad @ weight.dequantize(), rtol=1e-4, atol=1e-4)
assert triton_wna16(x[:0], *parts, 3).shape == (0, 33)

scheme = QuantScheme(4, 32, codebook="nf4")
weight = QuantizedTensor(torch.randint(256, (33, 32), dtype=torch.uint8), torch.rand(33, 2), None, scheme)
parts = CODEBOOK().prepare(weight, LinearSpec(scheme, 33, 64, torch.float32, "cpu"))
x = torch.randn(3, 64, requires_grad=True)
torch.library.opcheck(triton_codebook, (x, *parts), test_utils=checks)
triton_codebook(x, *parts).backward(grad)
torch.testing.assert_close(x.grad, grad @ weight.dequantize(), rtol=1e-4, atol=1e-4)
assert triton_codebook(x[:0], *parts).shape == (0, 33)
sys.stdout.write(f"{done} agree")
