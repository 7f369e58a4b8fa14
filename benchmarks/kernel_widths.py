"""Every kernel that runs on this machine against float64, on widths that models have and kernels are not made for.

    python benchmarks/kernel_widths.py [--share 1.0] [--seed 0]

All of K x N x scheme x dtype x rows for every backend; ``--share`` takes a random part of them. Ends with status 1 and the
list of the products that are wrong. A part of it is in the tests.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from typing import Any

import torch

from hf_quant import _plugins
from hf_quant.core.numerics import quantize_rows
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import SchemeError
from hf_quant.kernels import LinearBackend, LinearSpec, refusal
from hf_quant.methods import method

WIDTHS = (32, 96, 160, 576, 640, 896, 960, 1536, 4864)
HEIGHTS = (1, 3, 33, 576)
ROWS = (1, 2, 9, 70)
SCHEMES = (
    "W2A16-g32", "W3A16-g32-asym", "W4A16-g32", "W4A16-g64-asym", "W8A16-g32", "W2A16-g-1-asym", "W3A16-g-1", "W4A16-g-1",
    "W8A16-g-1-asym", "W4A16-g16", "W4A16-g32-nf4", "W8A8", "W8A8-g32-asym", "W4A8-g32", "W4A8-g64", "W3A8-g-1",
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ROUGH = 3e-2  # packed products in bf16; codes of activations that lie halfway, all of a row maybe, may go either way
Case = tuple[str, str, int, int, torch.dtype]


def cases() -> list[Case]:
    """``(backend, scheme, N, K, dtype)``, whether or not the backend can run it."""
    return list(itertools.product(_plugins.names("kernels"), SCHEMES, HEIGHTS, WIDTHS, DTYPES))


def backend_for(case: Case) -> tuple[LinearBackend[Any], LinearSpec] | None:
    """None where the backend says that it cannot run this, or the scheme does not fit the width."""
    name, slug, n, k, dtype = case
    if name.startswith("triton"):
        return None  # interpreted, a product of this size takes minutes; the tests of Triton have their own
    scheme = QuantScheme.parse(slug)
    try:
        scheme.groups(k)
    except SchemeError:
        return None
    spec = LinearSpec(scheme, n, k, dtype, "cpu")
    backend: LinearBackend[Any] = _plugins.load("kernels", name).BACKEND()
    return None if refusal(backend, spec) else (backend, spec)


def error(backend: LinearBackend[Any], spec: LinearSpec) -> float:
    """The largest error of a product over some numbers of rows, relative to the size of its terms; NaN where it has a wrong shape or dtype."""
    scheme, n, k, dtype = spec.scheme, spec.out_features, spec.in_features, spec.dtype
    plain = QuantScheme(scheme.bits, scheme.group_size, scheme.symmetric)
    made = method("rtn", steps=0).quantize(torch.randn(n, k) + 0.1, plain, dtype)
    weight = QuantizedTensor(made.qweight, made.scale, made.zero_point, scheme)
    prepared, whole, worst = backend.prepare(weight, spec), weight.dequantize(torch.float64), 0.0
    if not torch.equal(backend.restore(prepared, spec), weight.qweight):
        return float("nan")
    for m in ROWS:
        x = torch.randn(m, k).to(dtype)
        codes, scale = quantize_rows(x) if scheme.activations else (x, torch.ones(1))
        wide = codes.double() * scale.double()
        expected, size = wide @ whole.T, (wide.square() @ whole.T.square()).sqrt()  # of sums that cancel out nothing
        got = backend.linear(x, prepared, spec)
        if got.shape != expected.shape or got.dtype != dtype:
            return float("nan")
        worst = max(worst, float((got.double() - expected).norm() / size.norm()))
    return worst


def limit(case: Case) -> float:
    """Above it a product is wrong."""
    name, slug, _, _, dtype = case
    return max(LIMITS[dtype], ROUGH if name == "cpu_int4" or "A8" in slug else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args, ran, wrong = parser.parse_args(), 0, []
    picked = random.Random(args.seed)
    torch.manual_seed(args.seed)
    for case in cases():
        if picked.random() >= args.share or (found := backend_for(case)) is None:
            continue
        ran += 1
        if not (far := error(*found)) < limit(case):
            wrong.append((*case, far))
            print(wrong[-1], flush=True)
    print(f"{ran} layers, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
