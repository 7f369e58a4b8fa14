"""Windows of a training text that are not trained on: the loss on them decides which state of a training is kept."""

from __future__ import annotations

import torch
from torch import Tensor


def held_out(total: int, every: int) -> Tensor:
    """Which of ``total`` windows are held out, bool ``[total]``: every ``every``-th one; of fewer, the last one."""
    numbers = torch.arange(total)
    return numbers == total - 1 if total < every else numbers % every == every - 1
