"""Batches of model inputs, as a processor returns them: pixel values, features of sounds, token ids and masks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_quant.disk.safetensors import read_header
from hf_quant.errors import HfQuantError

FEWEST = 2  # batches to calibrate on: one is held out
TOGETHER = 4  # samples of a file in a batch
Inputs = dict[str, Tensor]  # the arguments of a model for one batch
ROWS = (
    "input_ids",
    "input_values",
    "input_features",
    "pixel_values",
)  # the first of them that is there says how many samples a batch has
CONTENT = ("pixel_values", "pixel_values_videos", "input_features", "input_values")  # what identifies a sample
GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}  # patches of each image
SAMPLES = ("attention_mask", "token_type_ids", "labels", "decoder_input_ids", "decoder_attention_mask", "pixel_mask")
LIKE_IDS = ("attention_mask", "position_ids")  # have a value for each token


def are_batches(source: Any) -> TypeGuard[Iterable[Mapping[str, Any]]]:
    """Whether data are neither text nor token ids, but mappings of names to tensors, or something that yields them."""
    if source is None or isinstance(source, str | Path | Tensor) or not isinstance(source, Iterable):
        return False
    if not isinstance(source, Sequence):
        return True
    return len(source) > 0 and isinstance(source[0], Mapping) and not is_record(source[0])


def is_record(row: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds a text or messages, and no inputs of a model beside them."""
    return bool(row.keys() & {"text", "messages"}) and not row.keys() & {*ROWS, *CONTENT}


def holds_inputs(path: Path) -> bool:
    """Whether a safetensors file holds inputs of a model, by their names, and not token ids alone.

    Raises:
        HfQuantError: There is no such file, or it is damaged.
    """
    if not path.is_file():
        raise HfQuantError(f"{path}: no such file")
    names = set(read_header(path))
    return bool(names & {*ROWS} - {"input_ids"}) or (len(names) > 1 and "input_ids" in names)


def read_batches(path: Path, together: int = TOGETHER) -> list[Inputs]:
    """The batches in a safetensors file, whose tensors have the names of the model's inputs and as many samples as each other.

    Args:
        path: The file.
        together: Samples of a batch; fewer where there would be too few batches to calibrate on.

    Raises:
        HfQuantError: They have not.
    """
    tensors = load_file(path)
    counts = {name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1:
        raise HfQuantError(f"{path.name}: its tensors must have one first axis, the samples, and have {counts}")
    samples = next(iter(counts.values()))
    size = max(1, min(together, samples // FEWEST))
    batches = [{n: t[i : i + size].clone() for n, t in tensors.items()} for i in range(0, samples, size)]
    return batches or [tensors]  # which is refused, since it is empty


def checked_batches(
    source: Iterable[Mapping[str, Any]], fewest: int = FEWEST, purpose: str = "calibration"
) -> tuple[Inputs, ...]:
    """The batches as tensors; floating point becomes float32.

    Args:
        source: The batches.
        fewest: How many are needed.
        purpose: What they are for, which every message begins with.

    Raises:
        HfQuantError: There are too few, or one is not as it must be; names the batch and the input.
    """
    try:
        batches = tuple(_checked(number, batch) for number, batch in enumerate(source))
        _check_together(batches, fewest)
    except HfQuantError as error:
        raise HfQuantError(f"{purpose}: {error}") from None
    return batches


def _check_together(batches: Sequence[Inputs], fewest: int) -> None:
    if not batches:
        raise HfQuantError("there is no batch")
    if len(batches) < fewest:
        raise HfQuantError(f"{len(batches)} batch is too little; at least {fewest}, since one is held out")
    for number, batch in enumerate(batches):
        if batch.keys() != batches[0].keys():
            raise HfQuantError(
                f"batch {number} has {', '.join(sorted(batch))}, and the first one has {', '.join(sorted(batches[0]))}"
            )


def _checked(number: int, batch: Any) -> Inputs:
    if not isinstance(batch, Mapping):
        raise HfQuantError(f"batch {number} is {type(batch).__name__}, not a mapping of the model's inputs to tensors")
    inputs = {str(n): _tensor(f"batch {number}: {n}", value) for n, value in batch.items() if value is not None}
    rows = next((name for name in ROWS if name in inputs), None)
    if not inputs:
        raise HfQuantError(f"batch {number} is empty: it names no input of the model")
    if "input_ids" in inputs:
        inputs = _with_samples(number, inputs)
    if rows is None:  # such as patches of several images one after the other, whose number is no number of samples
        return inputs
    for name in SAMPLES:
        if (
            name in inputs
            and len(inputs[name]) != len(inputs[rows])
            and (name != "pixel_mask" or rows == "pixel_values")
        ):
            raise HfQuantError(
                f"batch {number}: {name} {list(inputs[name].shape)} and {rows} {list(inputs[rows].shape)} "
                "differ in their first axis"
            )
    return inputs


def _with_samples(number: int, inputs: Inputs) -> Inputs:
    """The inputs with a first axis, the samples, if they are those of one text."""
    ids = inputs["input_ids"]
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise HfQuantError(
            f"batch {number}: input_ids must be whole numbers [S, T], got {ids.dtype} {list(ids.shape)}"
        )
    inputs = inputs | {"input_ids": ids.long()}
    for name in LIKE_IDS:
        if name in inputs and inputs[name].ndim == ids.ndim and inputs[name].shape != ids.shape:
            raise HfQuantError(
                f"batch {number}: {name} {list(inputs[name].shape)} and input_ids {list(ids.shape)} differ in shape"
            )
    return {name: tensor[None] for name, tensor in inputs.items()} if ids.ndim == 1 else inputs


def _tensor(where: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise HfQuantError(
            f"{where} is {type(value).__name__}, not a tensor: return_tensors='pt' makes a processor return some"
        ) from None
    if not tensor.numel() or not tensor.ndim:
        raise HfQuantError(f"{where} {list(tensor.shape)} is empty")
    if tensor.is_floating_point():
        if not tensor.isfinite().all():
            raise HfQuantError(f"{where} has NaN or infinite values")
        tensor = tensor.float()
    return tensor.detach().cpu()


def digest_of(batches: Sequence[Inputs]) -> str:
    """Identifies the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {tuple(batch[name].shape)} {batch[name].dtype} ".encode())
            digest.update(batch[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def without_padding(ids: Tensor, mask: Tensor | None) -> Tensor:
    """bool, which of the token ids ``[B, T]`` are no padding: those that a mask of their shape keeps; without one, all."""
    return torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask.bool()


def samples_in(batch: Inputs) -> int:
    """How many samples a batch has; 1 where its tensors do not say."""
    if "input_ids" in batch:
        return len(batch["input_ids"])
    counts = {len(tensor) for tensor in batch.values()}
    return counts.pop() if len(counts) == 1 else 1


def hashes_of(batches: Sequence[Inputs]) -> list[str]:
    """Hashes of all images and sounds, or of the token ids of each sample without padding where there is nothing else.

    They do not depend on how samples are grouped into batches, so that two sets with common hashes share content.
    """
    return sorted({_hash(part) for batch in batches for part in _content(batch)})


def _content(batch: Inputs) -> list[Tensor]:
    """One tensor for each image, sound or text."""
    names = [name for name in CONTENT if name in batch] or [name for name in ("input_ids",) if name in batch]
    return [part for name in names or batch for part in _parts(batch, name)]


def _parts(batch: Inputs, name: str) -> list[Tensor]:
    """What belongs to different samples or images; the whole tensor where that cannot be told."""
    tensor, mask, grid = batch[name], batch.get("attention_mask"), batch.get(GRIDS.get(name, ""))
    if grid is not None and int(grid.prod(-1).sum()) == len(tensor):  # patches of several images one after the other
        return list(tensor.split(grid.prod(-1).tolist()))
    if mask is not None and mask.shape == tensor.shape:
        return [row[kept] for row, kept in zip(tensor, mask.bool(), strict=True)]
    return list(tensor) if tensor.ndim > 2 or len(tensor) == samples_in(batch) else [tensor]


def _hash(part: Tensor) -> str:
    values = part if part.is_floating_point() else part.to(torch.int64)
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()[:16]
