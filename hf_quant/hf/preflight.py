"""All checks of a quantized checkpoint before memory is allocated, for loading and for ``verify``.

Tensors are checked by their place in the model and not by their name in the file: transformers renames tensors, and a check by
name alone would miss those.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hf_quant.checkpoint.contents import Contents
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.layout import COMPANIONS
from hf_quant.disk.safetensors import SIZES, TensorInfo
from hf_quant.errors import CheckpointError
from hf_quant.hf._compat import arrivals
from hf_quant.hf._hooks import may_be_missing
from hf_quant.hf.community import Placed, aliases, as_asked, homes, in_pooler, new_head, place
from hf_quant.hf.config import HfQuantConfig

# suffixes of quantized layers only: GPTQ and AWQ, compressed-tensors, HQQ, optimum-quanto, bitsandbytes
CODES = (".qweight", ".weight_packed", ".W_q", ".weight._data", ".weight.absmax", ".weight.quant_map", ".SCB")
# parameters that only training reads, which many checkpoints lack: of Wav2Vec2 and its relatives, of BEiT and its
UNUSED = (r"(^|\.)masked_spec_embed$", r"(^|\.)mask_token$")
MOST_BUFFERS = 1 << 28  # bytes that buffers made from config.json may take, besides the size of the checkpoint


def examine(model: Any, checkpoint: Checkpoint, config: HfQuantConfig) -> tuple[Contents, Placed]:
    """Find the quantized layers of a checkpoint and their places in the model, and check their small tensors.

    Args:
        model: Without weights, before any module is replaced.
        checkpoint: With checked headers.
        config: The parsed ``quantization_config``.

    Raises:
        HfQuantError: A layer is damaged, or has no place in the model or another shape there; names file and tensor.
    """
    stored = config.stored if config.stored is not None else _as_stored(config)
    contents = Contents.of(checkpoint, stored, called=aliases(model))
    placed = place(model, contents)
    placed.schemes = as_asked(placed.schemes, contents.fmt, stored, config.activations)
    for module in placed.homes:
        contents.check(module)
    return contents, placed


def _as_stored(config: HfQuantConfig) -> dict[str, Any]:
    """Check tensors in our own format, whatever the config says, so that no field can bypass it."""
    return {"quant_method": "hf_quant", "scheme": config.scheme, "overrides": config.overrides,
            "modules_to_not_convert": config.modules_to_not_convert}  # fmt: skip


def check_rest(
    model: Any, checkpoint: Checkpoint, names: Iterable[str], shaped: Collection[str] | None = None
) -> set[str]:
    """Check tensors that are not quantized, from the headers: they need the shape of the model, and a floating-point type.

    Args:
        model: Without weights, with its quantized modules inserted.
        checkpoint: With checked headers.
        names: Names of these tensors.
        shaped: Parameters whose shape is checked; None for all.

    Returns:
        Their names in the model.

    Raises:
        CheckpointError: Names file and tensor.
    """
    arriving, state = arrivals(model), model.state_dict()
    sources: dict[str, str] = {}
    covered: set[str] = set()
    for name in names:
        info = checkpoint.tensors[name]
        where = f"{info.file.name}: tensor {name}"
        targets, converted = arriving(name)
        target = targets[0]
        if target not in state:
            continue  # transformers reports it
        if state[target].is_floating_point() and not (info.is_float and SIZES[info.dtype] > 1):
            raise CheckpointError(
                f"{where} has dtype {info.dtype}, the model wants floating point: quantization_config does not say how to read it"
            )
        if not converted and target in sources:
            raise CheckpointError(f"{where}: {sources[target]} is the same tensor of the model, {target}")
        counts = not converted and (shaped is None or target in shaped)
        if counts and info.shape != tuple(state[target].shape):
            raise CheckpointError(
                f"{where} has shape {list(info.shape)}, config.json says {list(state[target].shape)}"
            )
        sources[target] = name
        covered.update(targets)
    return covered


def refuse_unexplained(checkpoint: Checkpoint) -> None:
    """Refuse codes in a checkpoint without a quantization config: transformers would use random weights.

    Raises:
        CheckpointError: Names file and tensor.
    """
    for name, info in checkpoint.tensors.items():
        if name.endswith(CODES):
            raise CheckpointError(
                f"{info.file.name}: tensor {name} is of a quantized layer, but config.json has no quantization_config that says how to read it"
            )


def check_complete(model: Any, placed: Placed, covered: set[str], names: Iterable[str] | None = None) -> None:
    """Check that every parameter is in the checkpoint, unless it is a new head's or the model's class allows it to be missing.

    Args:
        model: Without weights, with its quantized modules inserted.
        placed: The quantized layers.
        covered: Names of other parameters in the checkpoint.
        names: Names of the required parameters; None for all.

    Raises:
        CheckpointError: Names the first missing parameter.
    """
    stems = [stem for home in (*placed.schemes, *placed.dense) for stem in (home, f"{home}.weight")]
    covered = covered | {stem + part for stem in stems for part in ("", *COMPANIONS)}
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    partners = {a for pair in ties.items() for a in pair if covered & set(pair)}
    optional = [re.compile(pattern) for pattern in (*may_be_missing(model), *UNUSED)]
    head = new_head(model)
    for name in [name for name, _ in model.named_parameters()] if names is None else names:
        if name in covered or name in partners or name in head:
            continue
        if not any(pattern.search(name) for pattern in optional):
            raise CheckpointError(f"tensor {name} is missing from the checkpoint")


def check_float_checkpoint(model: Any, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint in floating point has every parameter of its model, from the headers.

    Args:
        model: Without weights.
        checkpoint: With checked headers.

    Raises:
        CheckpointError: A tensor is missing, does not fit, or is of a quantized layer; names it.
    """
    refuse_unexplained(checkpoint)
    covered, absent = check_rest(model, checkpoint, checkpoint.tensors), absent_poolers(model, checkpoint)
    covered |= {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in absent}
    check_complete(model, Placed(), covered)


def absent_poolers(model: Any, checkpoint: Checkpoint) -> list[str]:
    """Layers of a pooler that a checkpoint in floating point does not have, as many do not: nothing of them was trained.

    transformers draws their weights at random, and says so.
    """
    names = {name for name, _ in model.named_parameters() if in_pooler(name)}
    if not names:
        return []
    arriving = arrivals(model)
    covered = {target for name in checkpoint.tensors for target in arriving(name)[0]}
    return sorted({name.rpartition(".")[0] for name in names} - {name.rpartition(".")[0] for name in covered})


def check_whole(model: Any, contents: Contents) -> None:
    """Check that a checkpoint has every parameter of its model, from the headers, and that those in floating point fit.

    Args:
        model: Without weights, before any module is replaced.
        contents: The checkpoint.

    Raises:
        CheckpointError: Names the tensor.
    """
    placed = Placed(dense=dict.fromkeys(homes(model, contents).values(), ""))
    check_complete(model, placed, check_rest(model, contents.checkpoint, contents.rest))


def check_buffers(model: Any, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that buffers of the model are in proportion to the size of the checkpoint.

    Raises:
        CheckpointError: They would take far more memory than all weights.
    """
    most = MOST_BUFFERS + sum(info.nbytes for info in tensors.values())
    size = sum(buffer.nbytes for _, buffer in model.named_buffers())
    if size > most:
        raise CheckpointError(
            f"config.json: the model would make tables of {size} bytes for itself, the limit is {most}"
        )
