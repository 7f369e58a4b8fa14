"""Refuses to resize embeddings that train: their scales would keep the old number of rows."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from hf_quant.errors import PlanError
from hf_quant.training.modules import FakeQuant


def refuse_resizing(model: Any) -> None:
    """Let ``resize_token_embeddings`` of a trainable model, and of the models in it, refuse tables whose weights are rounded."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.resize_token_embeddings = partial(_resize, part)  # type: ignore[method-assign]


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """As transformers' own.

    Raises:
        PlanError: The input embeddings, or the output head, train with their weights rounded.
    """
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    rounded: Any = next((table for table in tables if isinstance(table, FakeQuant)), None)
    same = rounded is not None and pad_to_multiple_of is None and new_num_tokens in (None, rounded.weight.shape[0])
    if rounded is not None and not same:
        name = next(name for name, module in model.named_modules() if module is rounded)
        raise PlanError(
            f"resize_token_embeddings: {name} trains with its weight rounded, and its scales cannot be resized: resize the "
            "embeddings of the base in floating point, save it, and load that with HfQuantConfig(..., training=True)"
        )
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
