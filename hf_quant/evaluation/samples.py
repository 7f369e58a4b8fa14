"""Batches of inputs of a model that predicts tokens: which of its predictions count.

Those of tokens of the text do. Padding does not, and neither do the placeholders of images, videos and sounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.data.batches import Inputs, digest_of, without_padding
from hf_quant.data.held_out import PURPOSE
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.pieces import Piece
from hf_quant.hf.auto import vocabulary_of
from hf_quant.hf.batch_inputs import inputs_for

PLACEHOLDERS = tuple(f"{what}_token_{end}" for what in ("image", "video", "audio") for end in ("id", "index"))


@dataclass(frozen=True)
class Samples:
    """What `Windows` are of a text.

    Attributes:
        pieces: The batches.
        sources: int64 ``[P]``, the sample of each token whose prediction counts.
        inputs: Names of the inputs.
        sha256: Identifies the batches.
    """

    pieces: tuple[Piece, ...]
    sources: Tensor
    inputs: tuple[str, ...]
    sha256: str

    @property
    def context(self) -> int:
        """The most tokens in a sample."""
        return max(piece.scored.shape[1] for piece in self.pieces)

    @property
    def continued(self) -> Tensor:
        """int64 ``[P]``, the tokens whose prediction counts."""
        return torch.cat([piece.target for piece in self.pieces])

    @property
    def stride(self) -> int:
        """As for windows that do not overlap."""
        return self.context


def samples(model: Any, batches: Sequence[Inputs]) -> Samples:
    """The batches as arguments of ``model``, with the predictions that count.

    Args:
        model: The model, if only on the meta device.
        batches: As `data.batches.checked_batches` returns them.

    Raises:
        HfQuantError: The model takes no such inputs or needs others; or there is nothing to predict in them.
    """
    pieces: list[Piece] = []
    sources, first = [], 0
    for batch, inputs in zip(batches, inputs_for(model, batches, PURPOSE), strict=True):
        scored, target = predictions(batch, inputs, model.config)
        pieces.append(Piece(inputs, scored, target, torch.ones_like(target, dtype=torch.bool), first, "sample"))
        sources.append(first + scored.nonzero()[:, 0])
        first += len(scored)
    targets = torch.cat([piece.target for piece in pieces])
    if not len(targets):
        raise HfQuantError(
            f"{PURPOSE}: no token's prediction can be scored; labels, or at least two tokens of text in a sample, are needed"
        )
    if int(targets.max()) >= (vocabulary := vocabulary_of(model.config)):
        raise HfQuantError(f"{PURPOSE}: label {int(targets.max())} is outside of the vocabulary of {vocabulary}")
    return Samples(tuple(pieces), torch.cat(sources), tuple(sorted(batches[0])), digest_of(batches))


def predictions(batch: Inputs, inputs: Inputs, config: Any) -> tuple[Tensor, Tensor]:
    """The positions whose predictions count, bool ``[B, L]``, and the tokens that came there, int64 ``[P]``.

    Args:
        batch: What the user gave, with the labels of a decoder if there are any.
        inputs: The arguments of the model.
        config: Of the model.
    """
    if not getattr(config, "is_encoder_decoder", False):
        return _next(inputs, "input_ids", inputs.get("attention_mask"), config)
    mask = inputs.get("decoder_attention_mask")
    if "labels" not in batch:
        return _next(inputs, "decoder_input_ids", mask, config)
    labels = batch["labels"]
    scored = labels >= 0  # -100 marks padding
    scored &= True if mask is None else mask.bool()
    return scored, labels[scored]


def _next(inputs: Inputs, name: str, mask: Tensor | None, config: Any) -> tuple[Tensor, Tensor]:
    """The predictions of each token from those before it."""
    if name not in inputs:
        names = "labels or decoder_input_ids" if name == "decoder_input_ids" else name
        raise HfQuantError(f"{PURPOSE}: the model predicts tokens, and the batches have no {names}")
    ids = inputs[name]
    kept = without_padding(ids, mask)
    text = kept & ~torch.isin(ids, torch.tensor(placeholders(config), dtype=ids.dtype))
    scored = kept[:, :-1] & text[:, 1:]
    return F.pad(scored, (0, 1)), ids[:, 1:][scored]


def placeholders(config: Any) -> list[int]:
    """Tokens in whose place the model puts what it sees or hears."""
    parts = (config, getattr(config, "thinker_config", None))
    values = {getattr(part, name, None) for part in parts for name in PLACEHOLDERS}
    return sorted(value for value in values if isinstance(value, int))
