"""Quantizes a whole model as one block, where its blocks do not run one after the other, each once.

What enters it are token ids, and each layer is calibrated on the inputs of all its runs, however the model calls it. The model is run
once for each group of layers, and all of it is in memory.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hf_quant.errors import HfQuantError
from hf_quant.solve.block import Block
from hf_quant.solve.hidden_states import HiddenStates
from hf_quant.solve.result import Recipe, Solved
from hf_quant.solve.solve import choose, sample_of


@torch.no_grad()
def solve_whole(block: Block, tokens: HiddenStates, recipe: Recipe) -> Solved:
    """Quantize the layers of a model, and leave it with dequantized weights.

    Args:
        block: The model, in floating point.
        tokens: Token ids ``[S, T]``, and the model's other arguments for each batch of them.
        recipe: How to quantize.

    Raises:
        HfQuantError: An output is NaN or infinite, or a layer receives no tokens.
    """
    schemes = list(block.layers.values())
    twin = copy.deepcopy(block.module) if recipe.decision.drifts(schemes) else None
    before = sample_of(block, tokens, list(range(len(tokens))))
    solved = choose(block, tokens, recipe, twin, tokens if twin is not None else None)
    after = {i: block.run(tokens.batch(i, block.name)) for i in before}
    if not all(output.isfinite().all() for output in after.values()):
        raise HfQuantError(f"{type(block.module).__name__}: its outputs on the calibration text are NaN or infinite")
    solved.error = _error(before, after)
    return solved


def _error(before: dict[int, Tensor], after: dict[int, Tensor]) -> float:
    """Squared error over squared output, where both have one shape: the length of an output may depend on values."""
    pairs = [(one, after[i]) for i, one in before.items() if after[i].shape == one.shape]
    off = sum((other - one).double().square().sum().item() for one, other in pairs)
    size = sum(one.double().square().sum().item() for one, _ in pairs)
    return off / size if size else 0.0
