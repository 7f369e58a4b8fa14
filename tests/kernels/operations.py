"""Arguments that the operations of ``torch.ops.hf_quant`` may be given, and the call of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_quant import _plugins
from hf_quant.core.numerics import levels
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels import LinearSpec
from hf_quant.kernels._native import compiled
from hf_quant.kernels._shared import ops, registration
from hf_quant.kernels._triton.tiles import why_no_triton
from hf_quant.kernels.cpu_native import BACKEND as CpuNative
from hf_quant.methods import method

for _name in _plugins.names("kernels"):
    if not _name.startswith("triton") or why_no_triton() is None:
        _plugins.load("kernels", _name)

N, K, M = 48, 128, 3
ASYMMETRIC = "W4A16-g32-asym"


def weight(slug: str = "W4A16-g32", n: int = N, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    scheme = QuantScheme.parse(slug)
    plain = method("rtn", steps=0).quantize(torch.randn(n, K), replace(scheme, codebook=None), dtype)
    return replace(plain, scheme=scheme)


def spec_of(w: QuantizedTensor, device: str = "cpu") -> LinearSpec:
    return LinearSpec(w.scheme, w.scale.shape[0], w.in_features, torch.bfloat16, device)


def kind_of(name: str) -> str:
    return name.removesuffix("_backward").removesuffix("_linear")


def arguments(name: str, slug: str = ASYMMETRIC, m: int = M, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """What the operation may be given.

    Args:
        name: The operation.
        slug: Scheme of the weight, of those operations that take more than one.
        m: Rows of x.
        dtype: Of x.
    """
    w, x, grad = weight(slug), torch.randn(m, K).to(dtype), torch.randn(m, N).to(dtype)
    row = torch.tensor([3, 5, 100], dtype=torch.int16)
    index, value = row.expand(N, 3).contiguous(), torch.randn(N, 3).bfloat16()
    first, kind, bits = grad if name.endswith("_backward") else x, kind_of(name), w.scheme.bits
    if kind in ("dequant", "triton_int8"):
        more = () if first is grad or kind == "dequant" else (row, torch.tensor([0.1]))
        return (first, w.qweight, w.scale, w.zero_point, bits, *more)
    if kind == "codebook":
        return first, w.qweight, w.scale, levels("nf4", torch.device("cpu"))
    if kind == "cpu_int4":
        p = _plugins.load("kernels", kind).BACKEND().prepare(w, spec_of(w))
        fixed = w.scheme.zero
        return (
            (grad, p.planes, p.scale, p.zero, fixed)
            if first is grad
            else (x, p.planes, p.scale_and_zero, p.scale, p.zero, 32, fixed)
        )
    if kind == "cpu_int8":
        codes, scale = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N)
        return (grad, codes, scale) if first is grad else (x, codes, scale, row, torch.tensor([0.1]))
    if kind.startswith("cpu_native"):
        p = CpuNative().prepare(w, spec_of(w))
        tiles, scale, zero = (
            None if t is None else t.clone() for t in (p.tiles, p.scale, p.zero)
        )  # not in a large page
        if first is grad:
            return grad, tiles, scale, zero, None, None, False, bits
        more = (row, torch.tensor([0.1])) if kind == "cpu_native_int8" else (None, None, False)
        return (x, tiles, scale, zero, *more, bits, N)
    if kind == "outlier_rows":
        return (grad, index, value, K) if first is grad else (x, index, value)
    if kind == "round_activations":
        return x, row, torch.tensor([0.1]), 0.0
    return in_planes(w, first, grad, index, value, name)


def in_planes(
    w: QuantizedTensor, first: Tensor, grad: Tensor, index: Tensor, value: Tensor, name: str
) -> tuple[Any, ...]:
    stacked, slug = "experts" in name, str(w.scheme)
    backend = _plugins.load("kernels", "triton_wna16").BACKEND()
    p = backend.prepare(w, spec_of(w))
    packed, counters, table = p.packed, p.counters, p.table
    parts = [p.scale, p.zero, torch.randn(N).bfloat16(), index, value]
    if stacked:
        packed, *parts = (None if part is None else torch.stack([part, part]) for part in (packed, *parts))
    scale, zero, bias, index, value = parts
    more = (torch.tensor([1, grad.shape[0]]), None) if stacked else ()
    if first is grad:
        return (grad, packed, scale, zero, table, index, value, *more[:1], slug, K)
    return (first, packed, counters, scale, zero, table, bias, index, value, slug, *more)


def runs_here(name: str) -> bool:
    return not name.startswith("triton") or os.environ.get("TRITON_INTERPRET") == "1"


def built(name: str) -> bool:
    """Whether the module that the operation calls was compiled, for a processor like this one."""
    if name.startswith("cpu_native_int8"):
        return compiled.built() in compiled.BYTES
    return not name.startswith("cpu_native") or compiled._cpu is not None


def called(name: str) -> Callable[..., Any]:
    """The operation; or its checks, where it does not run here."""
    return ops.OPS[name] if runs_here(name) else checked(name)


def checked(name: str) -> Callable[..., None]:
    """The checks of an operation that does not run here."""
    return lambda *args: ops.TABLE[name].check(registration.Arguments(name, args[0]), *args)
