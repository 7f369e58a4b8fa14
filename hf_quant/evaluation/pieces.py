"""What goes through a model at once, and which of its predictions of tokens count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hf_quant.data.batches import Inputs
from hf_quant.data.text import Windows
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.seq2seq import Halves
from hf_quant.hf.batch_inputs import arguments, on_device


@dataclass(frozen=True)
class Piece:
    """Some windows of a text, or a batch of samples.

    Attributes:
        inputs: Arguments of the model.
        scored: bool ``[B, L]``, whether the prediction at a position counts.
        target: int64 ``[P]``, the tokens that came after those positions.
        inside: bool ``[P]``, whether each of them belongs to the document of the token before it.
        first: Number of the first row.
        unit: What the rows are, for messages.
    """

    inputs: Inputs
    scored: Tensor
    target: Tensor
    inside: Tensor
    first: int = 0
    unit: str = "window"

    def logits(self, model: Any) -> Tensor:
        """What ``model`` predicts, ``[B, L, V]``.

        Raises:
            HfQuantError: It gives no logits, or not one vector for each position.
        """
        logits = getattr(model(**arguments(model, on_device(model, self.inputs))), "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:-1] != self.scored.shape:
            form = list(logits.shape) if isinstance(logits, Tensor) else "no logits"
            raise HfQuantError(
                f"{type(model).__name__} gives {form} for tokens {list(self.scored.shape)}: which belongs to which cannot be told"
            )
        return logits

    def row(self, prediction: int) -> str:
        """The row that a scored prediction is in, for messages."""
        return f"{self.unit} {self.first + int(self.scored.nonzero()[prediction][0])}"


def of_windows(windows: Windows, rows: int) -> list[Piece]:
    """``rows`` windows of a text at a time."""
    return [_of_windows(windows, first, rows) for first in range(0, len(windows.ids), rows)]


def _of_windows(windows: Windows, first: int, rows: int) -> Piece:
    ids, scored, inside = (tensor[first : first + rows] for tensor in (windows.ids, windows.scored, windows.inside))
    target = ids[:, 1:][scored]
    if isinstance(windows, Halves):
        inputs, begin = windows.halves(ids)
        return Piece(inputs, scored[:, begin - 1 :], target, inside[scored], first)
    at = F.pad(scored, (0, 1))  # nothing is known of what follows the last token
    return Piece({"input_ids": ids}, at, target, inside[scored], first)
