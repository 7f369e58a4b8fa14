"""Run by test_cpu_native.py with HF_QUANT_CPU_LEVEL set: products of every width, and gradients, against float64."""

import json
import sys
from collections import defaultdict
from dataclasses import replace

import torch

from hf_quant.core.numerics import quantize_rows
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.kernels import LinearSpec, select
from hf_quant.kernels._native import compiled
from hf_quant.methods import method

torch.manual_seed(0)
own = torch.Tensor.new_empty
torch.Tensor.new_empty = lambda self, *a, **k: (
    lambda t: t.fill_(torch.nan) if t.is_floating_point() else t.fill_(99)
)(own(self, *a, **k))


def layer(slug, n, k, dtype):
    scheme, stats = QuantScheme.parse(slug).fitted(k), InputStats.empty(k)
    stats.update(torch.randn(50, k) * torch.logspace(-1, 1, k))
    made = method("rtn", steps=0).quantize(torch.randn(n, k) + 0.1, replace(scheme, real_zero=False), dtype, stats)
    zero = made.zero_point.to(dtype) + 0.25 if scheme.real_zero else made.zero_point
    weight = replace(made, scheme=scheme, zero_point=zero)
    if (
        scheme.real_zero and dtype is torch.float32
    ):  # as in Q4_1 of GGUF, where a number is subtracted from scaled codes
        scale = made.scale.half().float()
        weight = replace(weight, scale=scale, zero_point=(zero * scale).half().float() / scale)
    if scheme.activations == "tensor":
        weight = replace(weight, input_scale=torch.tensor([2.5 / 127], dtype=dtype))
    return replace(weight, outliers=None), weight.outliers, LinearSpec(scheme, n, k, dtype, "cpu")


def rounded(x, weight, left):
    """What is multiplied: ``x`` itself, or its codes times their scale, without outlier columns."""
    if weight.scheme.activations is None:
        return x.double()
    if left is not None:
        x = x.index_fill(1, left.index.long(), 0)
    codes, scale = quantize_rows(x, weight.input_scale)
    return codes.double() * scale.double()


def far(got, expected):
    return float((got - expected).norm() / expected.norm())


worst = {kind: defaultdict(float) for kind in ("worst", "worst_int8", "worst_gradient")}
SHAPES = ((33, 96), (5, 32), (64, 256), (272, 1056))
for threads, shapes in ((1, SHAPES), (2, SHAPES[-1:])):  # threads share the work of a large one
    torch.set_num_threads(threads)
    for slug in sys.argv[1:]:
        for n, k in shapes:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                weight, left, spec = layer(slug, n, k, dtype)
                backend, whole = select(spec), weight.dequantize(torch.float64)
                full = replace(weight, outliers=left)
                prepared = backend.prepare(full, spec)
                assert torch.equal(backend.restore(prepared, spec), weight.qweight), (slug, n, k)
                kind = "worst" if weight.scheme.activations is None else "worst_int8"
                for m in (0, 1, 2, 3, 4, 7, 8, 9, 13, 17, 33, 130):
                    x = torch.randn(m, k).to(dtype)
                    got = backend.linear(x, prepared, spec)
                    assert got.dtype is dtype and got.shape == (m, n)
                    if m:
                        error = far(got, rounded(x, weight, left) @ whole.T)
                        worst[kind][str(dtype)] = max(worst[kind][str(dtype)], error)
                x, grad = torch.randn(3, k).to(dtype).requires_grad_(), torch.randn(3, n).to(dtype)
                backend.linear(x, prepared, spec).backward(grad)
                error = far(x.grad, grad.double() @ whole)
                worst["worst_gradient"][str(dtype)] = max(worst["worst_gradient"][str(dtype)], error)
sys.stdout.write(json.dumps({"level": compiled.built(), **worst}))
