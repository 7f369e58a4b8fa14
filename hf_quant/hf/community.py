"""Checkpoints of other programs: the places of their layers in the model.

A checkpoint may have other names than the model, and experts that are separate in the file may be stacked in the model. Both
follow from transformers' own conversions for float checkpoints, which are applied here to each tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_quant.checkpoint.contents import Contents
from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import CheckpointError
from hf_quant.formats import Called, Format, Layer
from hf_quant.hf._compat import renamer
from hf_quant.hf._hooks import may_be_unexpected
from hf_quant.hf.candidates import Candidate, candidates

# names of the matrices in a stack that programs write when they unstack the experts of transformers 5
PIECES = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_NUMBER = re.compile(r"\.experts\.(\d+)\.")
_PIECE = re.compile(r"(?P<experts>.*\.experts)\.\d+\.(?P<piece>gate_proj|up_proj|down_proj)(\.weight)?")


@dataclass
class Placed:
    """The quantized layers of a checkpoint, by their names in the model.

    Attributes:
        schemes: Layer, or full name of a stack of experts, to its scheme.
        scale_dtypes: Layer or stack to the dtype of its scales.
        dense: Layer or stack to the reason why it is dequantized.
        coded: Layers and stacks of ``dense`` that have codes in the checkpoint, to their scheme there.
        homes: Layer of the checkpoint to the layer or stack of the model that contains it.
        files: Layer of the model to the file and name of one of its tensors, for messages.
        notes: Remarks, each once.
    """

    schemes: dict[str, QuantScheme] = field(default_factory=dict)
    scale_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    coded: dict[str, QuantScheme] = field(default_factory=dict)
    homes: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def remember(self, home: str, layers: Mapping[str, Layer]) -> None:
        """Put a layer of ``dense`` into `coded`, if the file has one scheme for it."""
        schemes = {layer.scheme for layer in layers.values()}
        if len(schemes) == 1 and (scheme := schemes.pop()) is not None:
            self.coded[home] = scheme


def homes(model: Any, contents: Contents) -> dict[str, str]:
    """Quantized layer of a checkpoint to the name of the layer or stack in ``model`` that contains it.

    Args:
        model: Without weights, before any module is replaced.
        contents: The checkpoint.

    Raises:
        CheckpointError: The model has no place for a layer.
    """
    by_name, rename, parameters = candidates(model), renamer(model), dict(model.named_parameters())
    places: dict[str, str] = {}
    for module, layer in contents.layers.items():
        target, converted = rename(f"{module}.weight") if len(layer.shape) == 2 else rename(module)
        home, experts = _home(target, by_name)
        if experts and home in by_name and not getattr(model.get_submodule(experts), "is_concatenated", True):
            raise CheckpointError(f"{contents.where(module)}: this model interleaves the rows of gate and up")
        if home in by_name:
            if converted and by_name[home].kind != "experts":
                raise CheckpointError(
                    f"{contents.where(module)}: transformers rearranges this weight, which codes do not allow"
                )
            places[module] = home
        elif target in parameters and parameters[target].shape == layer.shape:  # routers
            places[module] = target
        elif not _may_be_left(model, f"{module}.weight") and not _is_other_head(model, contents, module):
            raise CheckpointError(f"{contents.where(module)}: the model has no layer of that name")
    return places


def _is_own_class(model: Any) -> bool:
    """Whether the checkpoint was written by a model of this class, as far as its config.json says."""
    names = getattr(model.config, "architectures", None)
    return not names or type(model).__name__ in names


def new_head(model: Any) -> set[str]:
    """The parameters outside of the base model, and of its pooler, where the checkpoint is of a class with another head.

    transformers draws those that the checkpoint lacks at random, and says so.
    """
    if _is_own_class(model):
        return set()
    inside = {id(parameter) for name, parameter in model.base_model.named_parameters() if not in_pooler(name)}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in inside}


def in_pooler(name: str) -> bool:
    """Whether a parameter is of the layer that makes one vector of a text or an image, as BERT and ViT have it."""
    return "pooler" in name.split(".")


def _is_other_head(model: Any, contents: Contents, module: str) -> bool:
    """Whether a layer of the checkpoint is beside the base model, of another class than that which is being loaded."""
    if module.rpartition(".")[2] == "lm_head":  # of a LLaVA, beside a language model that has another prefix
        return not _is_own_class(model)
    prefix = f"{model.base_model_prefix}."
    beside = any(name.startswith(prefix) for name in contents.checkpoint.tensors) and not module.startswith(prefix)
    return beside and not _is_own_class(model)


def _home(target: str, by_name: Mapping[str, Candidate]) -> tuple[str, str]:
    """The layer or stack for a renamed tensor; and the experts layer, if other programs unstacked it."""
    home = target if target in by_name else target.removesuffix(".weight")
    piece = _PIECE.fullmatch(home) if home not in by_name else None
    return (f"{piece['experts']}.{PIECES[piece['piece']]}", piece["experts"]) if piece else (home, "")


def place(model: Any, contents: Contents) -> Placed:
    """Find the place of each quantized layer in ``model``, and check that it fits there.

    Args:
        model: Without weights, before any module is replaced.
        contents: The checkpoint.

    Raises:
        CheckpointError: A layer has no place in the model or another shape there, or a stack is incomplete.
    """
    by_name = candidates(model)
    placed = Placed(
        homes=homes(model, contents),
        notes=sorted({layer.note for layer in contents.layers.values() if layer.note and layer.scheme}),
    )
    by_home: dict[str, dict[str, Layer]] = {}
    for module, home in placed.homes.items():
        by_home.setdefault(home, {})[module] = contents.layers[module]
    for home, layers in by_home.items():
        placed.files[home.removesuffix(".weight")] = contents.where(next(iter(layers)))
        if home in by_name:
            _place_one(placed, home, by_name[home], layers, contents)
        else:
            leaf = home.removesuffix(".weight").rpartition(".")[2]
            placed.dense[home.removesuffix(".weight")] = f"{leaf}: the model keeps this weight in floating point"
            placed.remember(home.removesuffix(".weight"), layers)
    _check_bias(model, contents)
    _check_ties(model, placed, contents)
    if contents.fmt.in_memory and placed.dense:  # its tensors go into the model as they are
        home, reason = next(iter(placed.dense.items()))
        raise CheckpointError(f"{placed.files[home]}: {reason}")
    return placed


def aliases(model: Any) -> Called:
    """Names that a ``quantization_config`` may use for a module of the checkpoint: that in the file, that in the model, and the
    latter with or without the prefix of the base model, since that part may be loaded alone."""
    rename, prefix, by_name = renamer(model), f"{model.base_model_prefix}.", candidates(model)

    def called(module: str) -> list[str]:
        targets = (rename(name)[0] for name in (f"{module}.weight", module))  # for a layer, for a stack of experts
        home = next((home for target in targets if (home := _home(target, by_name)[0]) in by_name), module)
        return list(dict.fromkeys([module, home, home.removeprefix(prefix), prefix + home]))

    return called


def as_asked(
    schemes: Mapping[str, QuantScheme], fmt: Format, stored: Mapping[str, Any], activations: str | None
) -> dict[str, QuantScheme]:
    """The schemes of a checkpoint with activations in floating point, or in INT8 as the program that wrote it rounds them.

    Args:
        schemes: From its format.
        fmt: Its format.
        stored: Its ``quantization_config``.
        activations: See `HfQuantConfig`.

    Raises:
        FormatError: That program rounds activations in a way that this package does not support.
    """
    if activations == "float":
        return {name: scheme.weights for name, scheme in schemes.items()}
    if activations is None:
        return dict(schemes)
    return {name: fmt.int8_activations(stored, scheme) for name, scheme in schemes.items()}


def _place_one(placed: Placed, home: str, at: Candidate, layers: dict[str, Layer], contents: Contents) -> None:
    first, *others = layers
    if at.kind == "experts" and len(layers[first].shape) == 2:
        _check_stack(home, at, layers, contents)
    elif others:
        raise CheckpointError(f"{contents.where(first)}: {others[0]} is the same layer of the model, {home}")
    elif at.kind == "patches" and not contents.fmt.in_memory:
        raise CheckpointError(f"{contents.where(first)}: a convolution, and this format holds linear layers")
    elif layers[first].shape != at.shape:
        raise CheckpointError(
            f"{contents.where(first)} has shape {list(layers[first].shape)}, config.json says {list(at.shape)}"
        )
    schemes = {layer.scheme for layer in layers.values()}
    reason = at.refusal or next((layer.note for layer in layers.values() if layer.scheme is None), None)
    if at.kind == "embedding" and not contents.fmt.in_memory:
        reason = reason or "embeddings of other programs become floating point"
    if len(schemes) > 1:
        reason = reason or "its experts are quantized in different ways"
    scheme = layers[first].scheme
    if reason is not None or scheme is None:
        placed.dense[home] = reason or "floating point"
        placed.remember(home, layers)
    else:
        placed.schemes[home] = scheme
        placed.scale_dtypes[home] = layers[first].scale_dtype


def _check_stack(home: str, at: Candidate, layers: dict[str, Layer], contents: Contents) -> None:
    experts, n, k = at.shape
    first = next(iter(layers))
    if len(layers) % experts:
        raise CheckpointError(f"{contents.where(first)}: {len(layers)} matrices for the {experts} experts of {home}")
    numbers = {int(match[1]) for module in layers if (match := _NUMBER.search(module))}
    if numbers and numbers != set(range(experts)):
        raise CheckpointError(f"{contents.where(first)}: experts {sorted(numbers)} instead of 0 to {experts - 1}")
    rows = n // (len(layers) // experts)
    for module, layer in layers.items():
        if layer.shape != (rows, k):
            raise CheckpointError(
                f"{contents.where(module)} has shape {list(layer.shape)}, config.json says {[rows, k]}"
            )
    for module in layers:
        if set(contents.names[module]) != set(contents.names[first]):
            lacks = sorted(set(contents.names[first]) ^ set(contents.names[module]))
            raise CheckpointError(f"{contents.where(module)}: {lacks[0]} is there for some experts only")


def _check_bias(model: Any, contents: Contents) -> None:
    """Refuse a bias that the model has no place for, unless it is all zeros, as some programs write them."""
    rename, names, stored = renamer(model), set(model.state_dict()), contents.checkpoint.tensors
    for name in (f"{module}.bias" for module in contents.layers):
        if name in stored and rename(name)[0] not in names and bool(contents.checkpoint.read(name).any()):
            raise CheckpointError(f"{stored[name].file.name}: tensor {name}: the layer has no bias in the model")


def _check_ties(model: Any, placed: Placed, contents: Contents) -> None:
    """Refuse a tied table that is quantized in one place and not in the other; our own format stores it once."""
    rename, stored = renamer(model), None
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        names = [name.removesuffix(".weight") for name in pair]
        coded = [name for name in names if name in placed.schemes or name in placed.dense]
        if len({placed.schemes.get(name) for name in coded}) > 1:
            raise CheckpointError(f"{placed.files[coded[0]]}: tied to {coded[1]}, which is quantized in another way")
        if len(coded) != 1:
            continue
        other = next(name for name in names if name not in coded)
        stored = stored or {rename(name)[0] for name in contents.rest}
        if coded[0] in placed.dense and f"{other}.weight" not in stored:  # a float table, which both share
            continue
        if not contents.fmt.in_memory or f"{other}.weight" in stored or other not in candidates(model):
            raise CheckpointError(f"{placed.files[coded[0]]} is quantized, but config.json ties it to {other}")
        placed.schemes[other] = placed.schemes[coded[0]]


def _may_be_left(model: Any, name: str) -> bool:
    """Whether the model's class says that its checkpoints may have this tensor, for example of a draft head."""
    return any(re.search(pattern, name) for pattern in may_be_unexpected(model))
