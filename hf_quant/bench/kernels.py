"""How fast the kernel of a scheme is beside PyTorch's own product here, on one layer: a glance, not a benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels import LinearSpec, select

TURNS, LEAST = 5, 0.004  # turns of each of the two, and seconds of one


def times_dense(spec: LinearSpec) -> float:
    """Speed of one row times the layer, over that of the same product in floating point; medians of turns of both."""
    scheme, n, k = spec.scheme, spec.out_features, spec.in_features
    with torch.inference_mode():
        codes = torch.randint(scheme.qmax + 1, (n, k), dtype=torch.uint8)
        scale = torch.full((n, scheme.groups(k)), 1e-3, dtype=spec.dtype)
        weight = QuantizedTensor.from_codes(codes, scale, torch.empty(0, dtype=torch.float32), scheme)
        backend = select(spec)
        prepared = backend.prepare(weight, spec)
        x = torch.randn(1, k, dtype=torch.float32, device=spec.device).to(spec.dtype)
        dense = torch.randn(n, k, dtype=torch.float32, device=spec.device).to(spec.dtype)
        pairs = [(_seconds(lambda: F.linear(x, dense)), _seconds(lambda: backend.linear(x, prepared, spec)))
                 for _ in range(TURNS)]  # fmt: skip
    return statistics.median(base / ours for base, ours in pairs)


def _seconds(run: Callable[[], Tensor]) -> float:
    """Of one call, over as many as take a few milliseconds."""
    run()
    _wait()
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < LEAST:
        run()
        _wait()
        calls += 1
    return passed / calls


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
