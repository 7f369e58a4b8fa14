"""Sends every way in which transformers publishes a quantized model through the gate, or refuses it."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_quant import _upwards
from hf_quant.errors import PlanError, PushError
from hf_quant.hf._hooks import has_adapters, refuse_uploads
from hf_quant.nn._outside import Outside
from hf_quant.training.modules import FakeQuant

HOW = "publish it with model.push_to_hub(...) or hf-quant push, which check what it lost and what goes with it"


def guard(model: Any) -> None:
    """Let ``model.push_to_hub`` go through the gate, and ``save_pretrained`` save without publishing."""
    model.push_to_hub = partial(push_to_hub, model)
    model.save_pretrained = partial(save_pretrained, model)
    for name, part in _inner(model):
        if any(isinstance(module, (Outside, FakeQuant)) for module in part.modules()):
            part.save_pretrained = part.push_to_hub = partial(_refuse_part, type(part).__name__, name)


def release(model: Any) -> None:
    """Restore transformers' methods: the model is no longer quantized."""
    for part in (model, *(part for _, part in _inner(model))):
        for name in ("push_to_hub", "save_pretrained"):
            part.__dict__.pop(name, None)


def _inner(model: Any) -> list[tuple[str, Any]]:
    """The models inside of one, by their names there."""
    return [(name, part) for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel)]


def _refuse_part(kind: str, name: str, *_: Any, **__: Any) -> None:
    raise PlanError(
        f"{name}: it is a part of a quantized model, whose config speaks of the whole: save the whole, and load this part of it with "
        f"{kind}.from_pretrained or AutoModel.from_pretrained"
    )


def push_to_hub(model: Any, repo_id: str, **how: Any) -> Any:
    """Publish a quantized model, see ``hf_quant.publish.push.push_model``; adapters on one are published by transformers' method."""
    if has_adapters(model):
        return type(model).push_to_hub(model, repo_id, **how)
    return _upwards.push_model(model, repo_id, **how)


def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' ``save_pretrained``, which saves only the adapters of a model that has some.

    Raises:
        PushError: It is asked to publish a quantized model, too.
        PlanError: It is given other tensors than those of the model.
    """
    original = type(model).save_pretrained
    asked = inspect.signature(original).bind_partial(model, *args, **kwargs).arguments
    if has_adapters(model):
        original(model, *args, **kwargs)
        return
    if asked.get("push_to_hub"):
        raise PushError(f"save_pretrained(push_to_hub=True) would publish a quantized model unmeasured: {HOW}")
    if asked.get("state_dict") is not None:
        raise PlanError(
            "save_pretrained(state_dict=...): a quantized model is saved as it is, so load the tensors into it first"
        )
    original(model, *args, **kwargs)


def _refusal(thing: Any, folder: Path) -> PushError | None:
    """Why a folder must not be uploaded by transformers; None if it may be."""
    if not _is_ours(folder):
        return None
    return PushError(f"{type(thing).__name__}.push_to_hub would publish a quantized model unmeasured: {HOW}")


def _is_ours(folder: Path) -> bool:
    """Whether a folder that transformers has saved contains a model quantized by this package."""
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(stored, dict) and (stored.get("quant_method") == "hf_quant" or "hf_quant" in stored)


refuse_uploads(_refusal)
