"""What a model is run on: token ids, or batches of the inputs that its processor makes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_quant.data.batches import Inputs
from hf_quant.errors import HfQuantError
from hf_quant.hf.auto import vocabulary_of

OF_A_LOSS = ("labels",)  # what only a loss needs; a decoder's are what it shall write


def inputs_for(model: Any, batches: Sequence[Inputs], purpose: str = "calibration") -> list[Inputs]:
    """`fitting` for a model that exists already, if only on the meta device; none where there are no batches."""
    return fitting(type(model), model.config, batches, vocabulary_of(model.config), purpose) if batches else []


def fitting(
    kind: Any, config: Any, batches: Sequence[Inputs], vocabulary: int, purpose: str = "calibration"
) -> list[Inputs]:
    """The batches as arguments of a model.

    Args:
        kind: Class of the model.
        config: Its configuration.
        batches: As `data.batches.checked_batches` returns them.
        vocabulary: What token ids must be below.
        purpose: What they are for, which every message begins with.

    Raises:
        HfQuantError: The model takes no input of such a name, needs another one, or has no such token.
    """
    takes = inspect.signature(kind.forward).parameters
    given = [_with_decoder(batch, config) if "decoder_input_ids" in takes else batch for batch in batches]
    names = given[0].keys()
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    known = set(takes) | ({"input_ids"} if open_ended else set())
    superfluous = sorted(names - known) + [name for name in OF_A_LOSS if name in names & known]
    if superfluous:
        raise HfQuantError(
            f"{purpose}: {kind.__name__} takes no {superfluous[0]} without a loss; it takes {', '.join(_inputs(takes))}"
        )
    missing = [name for name in _needed(kind, takes) if name not in names]
    if missing:
        raise HfQuantError(f"{purpose}: the batches have no {missing[0]}, which {kind.__name__} needs")
    for number, batch in enumerate(given):
        for name in names & {"input_ids", "decoder_input_ids"}:
            low, high = int(batch[name].min()), int(batch[name].max())
            if low < 0 or high >= vocabulary:
                raise HfQuantError(
                    f"{purpose}: batch {number}: {name}: token id {low if low < 0 else high} is outside of the vocabulary of "
                    f"{vocabulary}"
                )
    return given


def _inputs(takes: Mapping[str, Any]) -> list[str]:
    """The names among a model's arguments that a processor may return."""
    endings = ("_ids", "_values", "_features", "_mask", "_thw", "_sizes")
    return [name for name in takes if name.endswith(endings) or "pixel_values" in name]


def _needed(kind: Any, takes: Mapping[str, Any]) -> list[str]:
    """The inputs that a model cannot do without."""
    required = [
        n for n, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and n != "self"
    ]
    main = getattr(kind, "main_input_name", "input_ids")
    general = main in ("inputs", "inputs_embeds")  # other names for what the model also takes by its own name
    needed = [*required, *([main] if main in takes and not general else [])]
    if "decoder_input_ids" in takes and main != "input_ids":
        needed.append("decoder_input_ids")
    return list(dict.fromkeys(needed))


def _with_decoder(batch: Inputs, config: Any) -> Inputs:
    """Labels of a model with a decoder become what the decoder is given, one place further on."""
    labels, rest = batch.get("labels"), {name: tensor for name, tensor in batch.items() if name != "labels"}
    if labels is None or labels.is_floating_point() or not getattr(config, "is_encoder_decoder", False):
        return batch
    if "decoder_input_ids" in batch:
        return rest
    return rest | {"decoder_input_ids": decoder_inputs(labels.clamp(min=0), config)}


def decoder_inputs(ids: Tensor, config: Any) -> Tensor:
    """What a decoder beside an encoder is given to predict ``ids [B, T]``: the token it starts with, and all but the last."""
    start = getattr(config, "decoder_start_token_id", None) or 0
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


def on_device(model: Any, inputs: Inputs) -> Inputs:
    """The inputs where the model is, and in the dtype that it computes in."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


@contextmanager
def same_draws() -> Iterator[None]:
    """Inside, a model that draws random numbers (masks of ViTMAE) draws the same ones every time; outside, nothing has changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def root_of(model: Any, names: Sequence[str]) -> Any:
    """What is run on inputs of these names: the model without its head, if that takes them all."""
    takes = inspect.signature(model.base_model.forward).parameters
    return model.base_model if all(name in takes for name in names) else model


def arguments(base: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of what is run, without a cache; a decoder beside an encoder gets token ids one place further on."""
    takes = inspect.signature(base.forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    given = dict(inputs)
    if "input_ids" not in takes and "inputs" in takes and "input_ids" in given:  # as in Perceiver
        given["inputs"] = given.pop("input_ids")
    if "use_cache" in takes or (open_ended and "input_ids" in inputs):
        given["use_cache"] = False
    if "decoder_input_ids" in takes and "decoder_input_ids" not in given and "input_ids" in inputs:
        given["decoder_input_ids"] = decoder_inputs(inputs["input_ids"], base.config)
    return given
