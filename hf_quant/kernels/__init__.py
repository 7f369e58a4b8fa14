"""Kernels: ways to compute ``x @ W.T`` from codes. One file each; `reference` is the oracle."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import lru_cache
from typing import Any

from hf_quant import _plugins
from hf_quant.errors import BackendError
from hf_quant.kernels._interface import LinearBackend as LinearBackend
from hf_quant.kernels._interface import LinearSpec as LinearSpec
from hf_quant.kernels._interface import prepared_tensors as prepared_tensors
from hf_quant.kernels._shared.outliers import outlier_linear as outlier_linear
from hf_quant.kernels._shared.rounded import RoundedPacked, RoundedViews
from hf_quant.kernels._shared.routing import back_in_order as back_in_order
from hf_quant.kernels._shared.routing import by_expert as by_expert
from hf_quant.kernels._triton.tiles import too_old

logger = logging.getLogger(__name__)


def select(spec: LinearSpec, *, repacking: bool = True) -> LinearBackend[Any]:
    """The first backend, highest priority first, that can run ``spec``; HF_QUANT_BACKEND names one.

    Args:
        spec: The layer.
        repacking: Whether a backend with a layout of its own will do; False where the codes must stay as they are,
            because somebody else moves them (offloading) or reads them too (a tied embedding).
    """
    return _select(spec, repacking, os.environ.get("HF_QUANT_BACKEND"))


def refusal(backend: LinearBackend[Any], spec: LinearSpec) -> str | None:
    """Why ``backend`` cannot run ``spec`` as it is; None if it can."""
    int8 = getattr(backend, "int8_activations", False)
    if int8 and spec.scheme.activations is None:
        return "INT8 activations only"
    if not int8 and spec.scheme.activations is not None:
        return "activations stay in floating point there"
    return backend.why_not(spec)


@lru_cache
def _select(spec: LinearSpec, repacking: bool, wanted: str | None) -> LinearBackend[Any]:
    backends = {n: _plugins.load("kernels", n).BACKEND() for n in ([wanted] if wanted else _plugins.names("kernels"))}
    reasons, int8 = [], []
    for name, backend in sorted(backends.items(), key=lambda item: -item[1].priority):
        reason = refusal(backend, spec)
        if reason is None and backend.repacks and not repacking:
            reason = "the codes must keep their layout here"
        if reason is None:
            if spec.device == "cuda" and (old := too_old()) is not None:
                _say_slow(old)
            chosen: LinearBackend[Any] = backend
            return chosen
        reasons.append(f"{name}: {reason}")
        int8 += reasons[-1:] if getattr(backend, "int8_activations", False) else []
    if spec.scheme.activations is not None:
        inner = _select(replace(spec, scheme=spec.scheme.weights), repacking, wanted)
        if wanted is None:
            _say(f"{spec.scheme} on {spec.device}", type(inner).__name__, "; ".join(int8))
        return RoundedPacked(inner) if inner.repacks else RoundedViews(inner)
    raise BackendError(f"no backend for {spec}: " + "; ".join(reasons))


@lru_cache
def _say(what: str, inner: str, reasons: str) -> None:
    """Once for each kind of layer."""
    logger.warning(f"{what}: activations are rounded, then multiplied in floating point by {inner} ({reasons})")


@lru_cache
def _say_slow(reason: str) -> None:
    logger.warning(
        f"the Triton kernels are not used on this GPU ({reason}): weights are dequantized by PyTorch, slower"
    )
