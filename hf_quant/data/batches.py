"""Batches of model inputs for calibration, as a processor returns them: pixel values, features of sounds, token ids and masks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_quant.errors import HfQuantError

FEWEST = 2  # batches: one is held out
TOGETHER = 4  # samples of a file in a batch
Inputs = dict[str, Tensor]  # the arguments of a model for one batch
ROWS = (
    "input_ids",
    "input_values",
    "input_features",
    "pixel_values",
)  # the first of them that is there says how many samples a batch has
SAMPLES = ("attention_mask", "token_type_ids", "labels", "decoder_input_ids", "decoder_attention_mask", "pixel_mask")


def are_batches(source: Any) -> TypeGuard[Iterable[Mapping[str, Any]]]:
    """Whether calibration data are neither text nor token ids, but mappings of names to tensors, or something that yields them."""
    if source is None or isinstance(source, str | Path | Tensor) or not isinstance(source, Iterable):
        return False
    return not isinstance(source, Sequence) or (len(source) > 0 and isinstance(source[0], Mapping))


def read_batches(path: Path) -> list[Inputs]:
    """The batches in a safetensors file, whose tensors have the names of the model's inputs and as many samples as each other.

    Raises:
        HfQuantError: They have not.
    """
    tensors = load_file(path)
    counts = {name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1:
        raise HfQuantError(f"{path.name}: its tensors must have one first axis, the samples, and have {counts}")
    samples = next(iter(counts.values()))
    size = max(1, min(TOGETHER, samples // FEWEST))
    return [{n: t[i : i + size].clone() for n, t in tensors.items()} for i in range(0, samples, size)]


def checked_batches(source: Iterable[Mapping[str, Any]]) -> tuple[Inputs, ...]:
    """The batches as tensors; floating point becomes float32.

    Raises:
        HfQuantError: There are too few, or one is not as it must be; names the batch and the input.
    """
    batches = tuple(_checked(number, batch) for number, batch in enumerate(source))
    if len(batches) < FEWEST:
        raise HfQuantError(
            f"calibration: {len(batches)} batch is too little; at least {FEWEST}, since one is held out"
        )
    for number, batch in enumerate(batches):
        if batch.keys() != batches[0].keys():
            raise HfQuantError(
                f"calibration: batch {number} has {', '.join(sorted(batch))}, and the first one has {', '.join(sorted(batches[0]))}"
            )
    return batches


def _checked(number: int, batch: Any) -> Inputs:
    if not isinstance(batch, Mapping):
        raise HfQuantError(
            f"calibration: batch {number} is {type(batch).__name__}, not a mapping of the model's inputs to tensors"
        )
    inputs = {str(n): _tensor(f"batch {number}: {n}", value) for n, value in batch.items() if value is not None}
    rows = next((name for name in ROWS if name in inputs), None)
    if not inputs:
        raise HfQuantError(f"calibration: batch {number} is empty: it names no input of the model")
    if rows is None:  # such as patches of several images one after the other, whose number is no number of samples
        return inputs
    for name in SAMPLES:
        if (
            name in inputs
            and len(inputs[name]) != len(inputs[rows])
            and (name != "pixel_mask" or rows == "pixel_values")
        ):
            raise HfQuantError(
                f"calibration: batch {number}: {name} {list(inputs[name].shape)} and {rows} {list(inputs[rows].shape)} "
                "differ in their first axis"
            )
    return inputs


def _tensor(where: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise HfQuantError(
            f"calibration: {where} is {type(value).__name__}, not a tensor: return_tensors='pt' makes a processor return some"
        ) from None
    if not tensor.numel() or not tensor.ndim:
        raise HfQuantError(f"calibration: {where} {list(tensor.shape)} is empty")
    if tensor.is_floating_point():
        if not tensor.isfinite().all():
            raise HfQuantError(f"calibration: {where} has NaN or infinite values")
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
