"""Whether a model's weights lie on a grid already, told from the first rows of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.grid import MOST, recovered
from hf_quant.core.scheme import QuantScheme

ROWS = 64
USUAL = ("W4A16-g32", "W4A16-g-1", "W4A16-g128", "W2A16-g-1", "W8A16-g-1")  # of trained models that were published


def grid_of(model: str, slugs: Sequence[str]) -> str | None:
    """A sentence on the grid of a local model, or None if its weights lie on none that is known here.

    Args:
        model: Folder or Hub id.
        slugs: The schemes that are asked for.
    """
    if not Path(model).is_dir():
        return None
    checkpoint = Checkpoint.open(Path(model))
    inner = (
        name
        for name, info in checkpoint.tensors.items()
        if name.endswith("proj.weight") and len(info.shape) == 2 and info.dtype in ("BF16", "F16", "F32")
    )
    if (name := next(inner, None)) is None:
        return None
    weight = checkpoint.read(name)[:ROWS].float()
    for slug in dict.fromkeys([*slugs, *USUAL]):
        scheme = QuantScheme.parse(slug).weights
        if scheme.blocks or weight.shape[1] % 32 or weight.shape[1] % max(1, scheme.group_size):
            continue
        groups = weight.unflatten(-1, (scheme.groups(weight.shape[1]), -1))
        grid = recovered(groups, scheme, torch.float32)
        if grid is not None and bool(grid[2].float().mean() > MOST):
            return f"the weights lie on a grid of {slug} already, from training: in that scheme their own codes are recovered"
    return None
