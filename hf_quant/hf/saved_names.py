"""The names under which ``save_pretrained`` writes the tensors of a quantized model.

On saving, transformers undoes the conversions of loading: it renames, splits and joins. Codes can be renamed, and stacks of experts
split, but other conversions of float weights cannot be applied to codes and their companions. So the names are computed here
first, with shapes only, and read back as the loader would.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from hf_quant.core.layout import COMPANIONS, PARTS, part_name
from hf_quant.errors import PlanError
from hf_quant.formats import format_named, in_memory_format
from hf_quant.hf._hooks import conversions_of, set_conversions
from hf_quant.hf.offload import onloaded
from hf_quant.nn import QuantMatrix
from hf_quant.nn._outside import Outside


def state_on_disk(model: Any, format: str) -> tuple[dict[str, Tensor], set[str]]:
    """The state dict of a quantized model as it is saved, and the names of codes and companions in it.

    Args:
        model: Quantized.
        format: Name of the format.
    """
    as_in_memory = format == in_memory_format()
    state: dict[str, Tensor] = model.state_dict()
    coded: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, Outside):
            continue
        module_names = {
            n for p in list(module._parameters) if module.float_shape(p) is not None for n in all_names(f"{name}.{p}")
        }
        if as_in_memory or not isinstance(module, QuantMatrix):
            coded |= module_names & state.keys()
            continue
        for coded_name in module_names:
            state.pop(coded_name, None)
        with onloaded(module):
            written = format_named(format).write(module.quantized_weight())
        for local, tensor in written.items():
            state[f"{name}.{local}"] = tensor
            coded.add(f"{name}.{local}")
    return state, coded


def all_names(codes: str) -> list[str]:
    """Names of all possible parts of a weight, from the name of its codes."""
    return [part_name(codes, part) for part in PARTS]


def stems(files: Mapping[str, str]) -> dict[str, str]:
    """Module to its name in the file, for modules with another name there."""
    pairs = [(name.rpartition("."), file.rpartition(".")) for name, file in files.items()]
    return {name[0]: file[0] for name, file in pairs if name[0] != file[0] and name[2] == file[2]}


def settle(model: Any, state: Mapping[str, Tensor], coded: Collection[str], conversions: list[Any]) -> dict[str, str]:
    """Let ``save_pretrained`` write names that can be loaded: those of the model's own checkpoints, or else of its modules.

    Args:
        model: Quantized; the conversions that saving undoes are replaced.
        state: All tensors to save, by the names in the model.
        coded: Names of codes and companions.
        conversions: The conversions of loading the result.

    Returns:
        Name of each coded tensor to its name in the file, without stacks that are split.

    Raises:
        PlanError: Neither can be loaded.
    """
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}
    problem = ""
    used = conversions_of(model)
    if model.config.to_dict().get("model_type") != model.config.model_type:
        used = []  # the model was loaded as another type than config.json will name
    for undone in (used, []):
        set_conversions(model, undone)
        try:
            files = revert_weight_conversion(model, dict(shapes))
            return _read_back(model, files, shapes, coded, deepcopy(conversions))
        except Exception as error:  # conversions raise any error for shapes that they do not expect
            problem = problem or f"{type(error).__name__}: {error}"
    raise PlanError(f"{type(model).__name__} cannot be saved so that it loads again: {problem}")


def _read_back(
    model: Any,
    files: Mapping[str, Tensor],
    shapes: Mapping[str, Tensor],
    coded: Collection[str],
    conversions: list[Any],
) -> dict[str, str]:
    """Load the files with shapes only; returns what `settle` returns."""
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    known = dict.fromkeys([*(name for name, _ in tensors), *shapes], True)
    collected: dict[str, Any] = {}
    for file in sorted(files, key=dot_natural_key):
        name, pattern = rename_source_key(file, renamings, converters, model.base_model_prefix, known)
        if name not in known and file in known:
            name, pattern = rename_source_key(file, [], [], model.base_model_prefix, known)
        one = deepcopy(by_pattern[pattern]) if pattern is not None else WeightRenaming(file, name)
        collected.setdefault(name, one).add_tensor(name, file, pattern or file, files[file])
    file_names, back = {}, set()
    for first, one in collected.items():
        for name, value in one.convert(first, model=model, config=model.config).items():
            tensor = value[0] if isinstance(value, list) else value
            if name not in shapes or tensor.shape != shapes[name].shape or tensor.dtype != shapes[name].dtype:
                raise PlanError(f"{name} would not come back as it was")
            kept = any(tensor is file for file in files.values())  # what is turned over only where it has to be
            if name in coded and isinstance(one, WeightConverter) and not _stacks(one) and not kept:
                raise PlanError(f"{name} would be rearranged, which codes do not allow")
            back.add(name)
            if name in coded and isinstance(one, WeightRenaming):
                file_names[name] = next(iter(one.layer_targets[first]))
    if back != set(shapes):
        raise PlanError(f"{min(set(shapes) - back)} would not be found again")
    _check_together(file_names, coded)
    return file_names


def _check_together(file_names: Mapping[str, str], coded: Collection[str]) -> None:
    """Refuse codes whose companions would be renamed in another way, since readers look for them beside each other."""
    for name in coded:
        for companion in COMPANIONS:
            other = name + companion
            if other in coded and file_names.get(other, other) != file_names.get(name, name) + companion:
                raise PlanError(f"{name} and {other} would not keep their names together")


def _stacks(converter: Any) -> bool:
    """Whether a converter only joins gate and up, and stacks experts."""
    first, *others = converter.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(type(op) is Concatenate and op.dim == 1 for op in others)
