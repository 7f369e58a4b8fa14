"""Loading besides ``from_pretrained``, and preparation for training adapters on a quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import PreTrainedModel

from hf_quant import _autoload
from hf_quant.checkpoint.config import FIELDS
from hf_quant.checkpoint.contents import quantization_of, refuse_training
from hf_quant.checkpoint.folder import INDEX, WEIGHTS, Checkpoint
from hf_quant.data.batches import Inputs
from hf_quant.disk.safetensors import TORCH
from hf_quant.errors import PlanError
from hf_quant.formats import formats, known_methods
from hf_quant.hf._compat import recompute_activations
from hf_quant.hf._hooks import build
from hf_quant.hf.auto import class_of, config_of, hub_options, vocabulary_of
from hf_quant.hf.batch_inputs import inputs_for, on_device, same_draws
from hf_quant.hf.config import HfQuantConfig, taken_over
from hf_quant.hf.foreign_errors import explained
from hf_quant.hf.plan import Plan, make_plan
from hf_quant.hf.preflight import check_float_checkpoint, examine
from hf_quant.hf.requantizing import quantized_already


def load(model: str, **kwargs: Any) -> Any:
    """``from_pretrained`` of the class that the checkpoint names; checkpoints of other programs keep their codes.

    Args:
        model: Folder or Hub id.
        kwargs: As for ``from_pretrained``: ``quantization_config``, ``dtype``, ``device_map``, ``revision``, ``subfolder``,
            ``trust_remote_code``, ...

    Raises:
        CheckpointError: The config names no class of transformers, or something in the checkpoint is invalid.
        FormatError: It is quantized in a way that this package does not read.
    """
    hub = hub_options(kwargs)
    folder = Path(model) / hub.get("subfolder", "")
    config = kwargs.pop("config", None) or config_of(model, **hub)
    with explained(model):
        stored = stored_in(config, folder if folder.is_dir() else _downloaded(model, hub))
        if isinstance(stored, Mapping):
            foreign = stored.get("quant_method") != "hf_quant"
            # some have it in another file, and by these fields transformers would take it for another program's checkpoint
            fields = {name: value for name, value in stored.items() if foreign or not name.startswith("load_in_")}
            config.quantization_config = fields
            if foreign and "quantization_config" not in kwargs:
                kwargs["quantization_config"] = understood(stored)  # transformers would skip a kind it does not know
        named = getattr(config, "transformers_weights", None) or WEIGHTS
        if stored is None and any((folder / name).is_file() for name in (named, INDEX)):
            checkpoint = Checkpoint.open(folder)
            check_float_checkpoint(skeleton(model, weights=checkpoint, **hub), checkpoint)
        return class_of(config, **hub).from_pretrained(model, config=config, **kwargs)


def stored_in(config: Any, folder: Path) -> Any:
    """The ``quantization_config`` of a model, from whichever file has it; None if the model is not quantized.

    Args:
        config: As `hf_quant.hf.auto.config_of` gives it.
        folder: The folder of a local model.
    """
    for part in (config, config.get_text_config(decoder=True)):
        for field in FIELDS:
            if (stored := getattr(part, field, None)) is not None:
                return stored
    return quantization_of(folder, {}) if folder.is_dir() else None


def _downloaded(model: str, hub: Mapping[str, Any]) -> Path:
    """The folder in the cache of the Hub's client where a file is that some formats have beside config.json; else no folder."""
    options = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
    where = {name: hub[name] for name in options if name in hub}
    files = [name for fmt in formats().values() for name in (fmt.config_file, fmt.marker_file) if name is not None]
    for name in files:
        with suppress(HfHubHTTPError, OSError, ValueError):  # there is no such file, or no connection
            return Path(hf_hub_download(model, name, **where)).parent
    return Path(model)


def understood(stored: Mapping[str, Any]) -> HfQuantConfig:
    """The configuration for a ``quantization_config`` of this package or another one.

    Raises:
        HfQuantError: This package does not read it; names the field.
    """
    if stored.get("quant_method") == "hf_quant":
        return HfQuantConfig.from_dict(dict(stored))
    return taken_over(stored)


def take_over(*methods: str) -> None:
    """From now on, run checkpoints of these kinds with this package, even if ``from_pretrained`` is not asked to.

    ``HF_QUANT_TAKE_OVER="gptq,awq"`` in the environment says the same to a program whose code is not at hand.

    Args:
        methods: As ``quant_method`` in their config.json: ``"gptq"``, ``"awq"``, ``"compressed-tensors"``,
            ``"bitsandbytes"``, ``"hqq"``, ``"auto-round"``, ``"torchao"``. No argument stops it. Kinds that transformers does not
            know, such as ``"modelopt"``, are run without being named here.

    Raises:
        PlanError: A kind is unknown.
    """
    unknown = sorted(set(methods) - set(known_methods()))
    if unknown:
        raise PlanError(f"take_over: {unknown[0]!r} is not one of {', '.join(known_methods())}")
    _autoload.taken_over.clear()
    _autoload.taken_over.update(methods)


def refuse_quantized(model: str, **hub: Any) -> None:
    """Refuse to quantize a model that is already quantized; ``hub`` as for `hf_quant.hf.auto.hub_options`.

    Raises:
        PlanError: It is quantized; says how, and what to do.
        FormatError: It is a training that can go on.
    """
    if stored := quantization_of(Path(model), config_of(model, **hub).to_dict()):
        refuse_training(model, stored)
        raise PlanError(f"{model}: {quantized_already(stored)}")


def plan_of(model: str, config: HfQuantConfig, *, dtype: torch.dtype | None = None, **hub: Any) -> tuple[Any, Plan]:
    """The model on the meta device, as `skeleton` builds it, and the plan of ``config`` for it."""
    refuse_quantized(model, **hub)
    on_meta = skeleton(model, dtype=dtype, **hub)
    return on_meta, make_plan(on_meta, config)


def stored_plan(model: Any, checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Plan:
    """The plan of a quantized checkpoint, from its headers and small tensors.

    Args:
        model: On the meta device, in floating point.
        checkpoint: With checked headers.
        stored: Its ``quantization_config``.

    Raises:
        HfQuantError: A layer is damaged, or has no place in the model; names file and tensor.
    """
    config = understood(stored)
    _, placed = examine(model, checkpoint, config)
    return make_plan(model, config, stored=placed.schemes)


def skeleton(model: str, *, weights: Checkpoint | None = None, dtype: torch.dtype | None = None, **hub: Any) -> Any:
    """The model on the meta device, built from config.json alone.

    Args:
        model: Folder or Hub id.
        weights: Its checkpoint, which gives the dtype if config.json does not.
        dtype: In place of the one of config.json.
        hub: As for `hf_quant.hf.auto.hub_options`.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    config = config_of(model, **hub)
    types = [TORCH[info.dtype] for info in weights.tensors.values() if info.is_float] if weights is not None else []
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else next(iter(types), torch.float32)
    with explained(model), torch.device("meta"):
        kind = class_of(config, **hub)
        return (
            build(kind, config, dtype) if issubclass(kind, PreTrainedModel) else kind.from_config(config, dtype=dtype)
        )


def sample_logits(model: Any, batch: Inputs | None = None) -> Tensor:
    """Logits of a few tokens ``[1, 16, vocab]``, or of a batch of other inputs; the first output of a model without logits."""
    if batch is not None:
        return _first_output(model, batch)
    ids = torch.arange(3, 19, device=model.device)[None] % vocabulary_of(model.config)
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, **extra)[0]
    return logits


def _first_output(model: Any, batch: Inputs) -> Tensor:
    (given,) = inputs_for(model, [batch])
    with torch.no_grad(), same_draws():
        out: Tensor = model(**on_device(model, given))[0]
    return out


def prepare_for_training(model: Any, *, gradient_checkpointing: bool = True) -> Any:
    """Freeze a quantized model and prepare it for adapters: gradients reach its inputs, activations are recomputed.

    To be used in place of PEFT's ``prepare_model_for_kbit_training``, which knows only the methods of transformers itself.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if gradient_checkpointing:
        recompute_activations(model)
    model.enable_input_require_grads()
    return model
