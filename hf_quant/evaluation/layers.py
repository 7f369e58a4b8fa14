"""How far each layer's weights are from the base's, read tensor by tensor: the first place to look when a gate is missed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.checkpoint import Checkpoint
from hf_quant.nn import QuantEmbedding, QuantExperts, QuantLinear

ROWS = 256


@dataclass(frozen=True, slots=True)
class LayerError:
    """One layer beside the base's.

    Attributes:
        layer: Its name.
        scheme: What it is quantized with.
        error: Relative error of its weights: the Frobenius norm of the difference, over the base's.
        sqnr_db: The same in decibels, ``-20 log10(error)``; None where there is no error.
    """

    layer: str
    scheme: str
    error: float
    sqnr_db: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.inference_mode()
def layer_errors(model: nn.Module, base: Checkpoint) -> list[LayerError]:
    """Every quantized layer that ``base`` holds under the same name, worst first.

    Args:
        model: Quantized.
        base: The checkpoint it was made from; one tensor at a time is read.
    """
    made = []
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            stored = f"{name}.weight"
            if stored in base.tensors:
                original = base.read(stored)
                turned = isinstance(module, QuantLinear) and module.conv1d
                made.append(_error(name, str(module.scheme), original.T if turned else original, module.dequantize()))
        elif isinstance(module, QuantExperts):
            for stack, scheme in module.schemes.items():
                stored = f"{name}.{stack}"
                if stored in base.tensors:
                    made.append(_error(stored, str(scheme), base.read(stored), module.expert_weight(stack)))
    return sorted(made, key=lambda each: -each.error)


def _error(name: str, scheme: str, original: Tensor, quantized: Tensor) -> LayerError:
    """Some rows at a time, since whole matrices in float32 would be the largest things in memory."""
    difference = norm = 0.0
    for a, b in zip(original.split(ROWS), quantized.cpu().split(ROWS), strict=True):
        difference += (a.float() - b.float()).square().sum().item()
        norm += a.float().square().sum().item()
    error = math.sqrt(difference / max(norm, 1e-30))
    return LayerError(name, scheme, error, -20 * math.log10(error) if error else None)
