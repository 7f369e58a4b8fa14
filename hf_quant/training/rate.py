"""The learning rate of a training for which nobody names one."""

from __future__ import annotations

import math

from torch import nn

from hf_quant.training.modules import FakeQuant

SHARE = 0.2  # of the distance between two codes; on the shipped model, 0.13 to 0.30 were right at 2, 3 and 4 bits
LARGEST = 1e-3  # what embeddings and norms, which have no codes, were seen to bear


def usual_rate(model: nn.Module, steps: int) -> float:
    """A learning rate of AdamW at which ``steps`` steps move a weight by a fifth of the way from one code to the next.

    AdamW moves a weight by about the rate in every step, mostly to and fro, so the way grows with the square root of the steps.
    Two digits are kept, so that a command can name the rate.

    Args:
        model: With rounded weights (`FakeQuant`).
        steps: How many.
    """
    total, count = 0.0, 0
    for module in model.modules():
        if isinstance(module, FakeQuant):
            for name in module.trained():
                values = module.values(name)
                total += values["_scale"].double().mean().item() * values[""].numel()
                count += values[""].numel()
    return float(f"{min(LARGEST, SHARE * total / count / math.sqrt(steps)):.2g}")
