"""Run by test_triton.py in a process of its own, since TRITON_INTERPRET must be set before triton is imported.

fp16 and fp32 only: the interpreter computes bf16 silently wrong.
"""

import sys

import torch

from hf_quant.kernels import LinearSpec
from hf_quant.kernels.triton_wna16 import BACKEND
from hf_quant.methods import method
from hf_quant.scheme import QuantScheme

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
sys.stdout.write(f"{done} agree")
