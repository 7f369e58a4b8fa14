"""The quantization error of each layer: the first thing to look at when a model misses its gate.

Weights are compared with those of the base, read tensor by tensor. That means nothing where a transform has rewritten
weights (a scale folded into a norm, a rotation). The errors of the layers' outputs are reported then, which calibration
measured and the recipe stores; without a recipe there is no result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.geometry import geometry_of
from hf_quant.disk.safetensors import SIZES
from hf_quant.hf import Plan
from hf_quant.nn import QuantEmbedding, QuantExperts, QuantMatrix

ROWS = 256
ROUNDED = 0.01  # relative change of a float tensor beyond what storing it in another dtype can cause


@dataclass(frozen=True, slots=True)
class LayerError:
    """The quantization error of one layer.

    Attributes:
        layer: Its name.
        scheme: What it is quantized with.
        error: Relative error: the norm of the difference over the norm of the original.
        sqnr_db: The same in decibels, ``-20 log10(error)``; None where there is no error.
        of: What is compared: ``"weights"`` with those of the base, or ``"outputs"`` on calibration data.
    """

    layer: str
    scheme: str
    error: float
    sqnr_db: float | None
    of: str = "weights"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def layer_errors(model: nn.Module, base: Checkpoint, blocks: Sequence[Mapping[str, Any]] = ()) -> list[LayerError]:
    """The errors of all quantized layers, largest first.

    Args:
        model: Quantized.
        base: The checkpoint it was made from.
        blocks: The blocks of its recipe if it was calibrated, which hold the errors of outputs.

    Returns:
        Empty where weights were rewritten before they were quantized and no recipe has the errors of outputs.
    """
    if blocks:
        return _of_outputs(model, blocks)
    return [] if rewritten(model, base) else _of_weights(model, base)


@torch.inference_mode()
def rewritten(model: nn.Module, base: Checkpoint) -> bool:
    """Whether a transform changed weights before they were quantized.

    The configuration says so. In checkpoints of other programs, norms and biases that differ from those of ``base`` say so.
    """
    if _transformed(model):
        return True
    for name, parameter in model.named_parameters():
        stored = base.tensors.get(name)
        if parameter.ndim == 1 and parameter.is_floating_point() and stored is not None:
            original = base.read(name).float()
            if original.shape != parameter.shape:
                return True
            if (parameter.cpu().float() - original).norm() > ROUNDED * original.norm().clamp(min=1e-30):
                return True
    return False


def _transformed(model: Any) -> bool:
    plan = getattr(getattr(model, "hf_quantizer", None), "plan", None)
    return isinstance(plan, Plan) and plan.decision.rewrites_weights


def _of_outputs(model: nn.Module, blocks: Sequence[Mapping[str, Any]]) -> list[LayerError]:
    """The errors of outputs, from the squared errors in the recipe."""
    schemes = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantMatrix):
            schemes[name] = module.scheme
        elif isinstance(module, QuantExperts):
            schemes |= {f"{name}.{stack}": scheme for stack, scheme in module.schemes.items()}
    errors = {name: error for block in blocks for name, error in block["layers"].items()}
    layer_errors = [
        _layer_error(name, str(schemes[name]), math.sqrt(error), "outputs")
        for name, error in errors.items()
        if name in schemes and error is not None
    ]
    return sorted(layer_errors, key=lambda layer: -layer.error)


@torch.inference_mode()
def _of_weights(model: nn.Module, base: Checkpoint) -> list[LayerError]:
    """The errors of the layers that ``base`` holds in floating point under the same name, with one tensor in memory at a time."""
    errors = []
    for name, module in model.named_modules():
        if isinstance(module, (QuantMatrix, QuantEmbedding)):
            stored = f"{name}.weight"
            if _is_original(base, stored, module.float_shape("weight")):
                original = base.read(stored)
                matrix = geometry_of(module).matrix(original)
                errors.append(_error(name, str(module.scheme), matrix, module.dequantize()))
        elif isinstance(module, QuantExperts):
            for stack, scheme in module.schemes.items():
                stored = f"{name}.{stack}"
                if _is_original(base, stored, module.float_shape(stack)):
                    errors.append(_error(stored, str(scheme), base.read(stored), module.expert_weight(stack)))
    return sorted(errors, key=lambda layer: -layer.error)


def _is_original(base: Checkpoint, name: str, shape: tuple[int, ...] | None) -> bool:
    """Whether a base has a weight of that name, in 16 bits or more, and of that shape; a base may be quantized itself."""
    info = base.tensors.get(name)
    return info is not None and info.is_float and SIZES[info.dtype] > 1 and info.shape == shape


def _error(name: str, scheme: str, original: Tensor, quantized: Tensor) -> LayerError:
    """The error in float64, computed a few rows at a time, since a whole matrix in float64 would take the most memory of all."""
    difference = norm = 0.0
    for a, b in zip(original.split(ROWS), quantized.cpu().split(ROWS), strict=True):
        difference += (a.double() - b.double()).square().sum().item()
        norm += a.double().square().sum().item()
    return _layer_error(name, scheme, math.sqrt(difference / max(norm, 1e-30)), "weights")


def _layer_error(name: str, scheme: str, error: float, of: str) -> LayerError:
    return LayerError(name, scheme, error, -20 * math.log10(error) if error else None, of)
