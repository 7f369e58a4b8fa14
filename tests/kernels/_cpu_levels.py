"""Run by test_cpu_native.py with HF_QUANT_CPU_LEVEL set: products of every width, against float64."""

import json
import sys

import torch

from hf_quant.kernels import LinearSpec, _cpu
from hf_quant.kernels.cpu_native import BACKEND
from hf_quant.methods import method
from hf_quant.scheme import QuantScheme

backend, worst = BACKEND(), {}
own = torch.Tensor.new_empty
torch.Tensor.new_empty = lambda self, *a, **k: (
    lambda t: t.fill_(torch.nan) if t.is_floating_point() else t.fill_(99)
)(own(self, *a, **k))
for threads in (1, 2):
    torch.set_num_threads(threads)
    for slug in sys.argv[1:]:
        for n, k in ((33, 96), (5, 32), (64, 256), (272, 1056)):
            scheme = QuantScheme.parse(slug).fitted(k)
            if k % max(scheme.group_size, 1):
                continue
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                weight = method("rtn", steps=0).quantize(torch.randn(n, k) + 0.1, scheme, dtype)
                spec = LinearSpec(scheme, n, k, dtype, "cpu")
                prepared = backend.prepare(weight, spec)
                assert torch.equal(backend.restore(prepared, spec), weight.qweight), (slug, n, k)
                for m in (0, 1, 2, 3, 4, 7, 8, 13, 17, 130):
                    x = torch.randn(m, k).to(dtype)
                    got = backend.linear(x, prepared, spec)
                    assert got.dtype is dtype and got.shape == (m, n)
                    expected = x.double() @ weight.dequantize(torch.float64).T
                    error = float((got - expected).norm() / expected.norm()) if m else 0.0
                    worst[str(dtype)] = max(worst.get(str(dtype), 0), error)
sys.stdout.write(json.dumps({"level": _cpu.level(), "worst": worst}))
