"""Windows of a text that nothing is learned from: the loss on them decides which state is kept."""

from __future__ import annotations

import torch
from torch import Tensor

LEARNED = 8  # where codes or scales are learned, one in so many windows is held out
PAIR = 2  # and two neighbours together, as batches of hidden states have them


def held_out(total: int, every: int, together: int = 1) -> Tensor:
    """Which of ``total`` windows are held out, bool ``[total]``: the last of ``every`` runs of ``together``; of fewer, the last run."""
    numbers = torch.arange(total)
    if total < every * together:
        return numbers >= total - together
    return numbers // together % every == every - 1


def held_from_learning(total: int) -> Tensor:
    """Which of ``total`` windows of a calibration text neither calibration nor learning may see, bool ``[total]``.

    One answer for all that look at a text one after the other: statistics of inputs, the learning of codes and scales in each block,
    and the training of scales end to end. What one of them has fitted is no evidence for the next.
    """
    return held_out(total, LEARNED, PAIR if total % PAIR == 0 and total > PAIR else 1)
