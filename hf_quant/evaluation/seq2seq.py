"""How an encoder with a decoder is measured on text: the encoder reads the first half of a window, the decoder predicts the second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_quant.data.text import Windows
from hf_quant.hf.batch_inputs import decoder_inputs


@dataclass(frozen=True)
class Halves(Windows):
    """Windows with only those tokens scored that the decoder predicts.

    Attributes:
        config: Of the model, which says what the decoder starts with.
    """

    config: Any

    def halves(self, ids: Tensor) -> tuple[dict[str, Tensor], int]:
        """The arguments of the model for windows ``[B, T]``, and the position of the first token that it predicts.

        The decoder is given the second half one place further on, after the token that it starts with (teacher forcing).
        """
        first = ids.shape[1] // 2
        return {"input_ids": ids[:, :first], "decoder_input_ids": decoder_inputs(ids[:, first:], self.config)}, first


def second_halves(windows: Windows, config: Any) -> Halves:
    """The windows, for a model of this configuration."""
    scored = windows.scored.clone()
    scored[:, : windows.context // 2 - 1] = False
    return Halves(windows.ids, windows.document, scored, windows.stride, config)
