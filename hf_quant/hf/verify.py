"""All checks of a checkpoint, one layer in memory at a time; the model is never loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_quant.checkpoint import Checkpoint
from hf_quant.contents import Contents, quantization_of
from hf_quant.errors import CheckpointError
from hf_quant.hf.community import place
from hf_quant.hf.loading import skeleton
from hf_quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Verified:
    """What was looked at.

    Attributes:
        format: Of the quantized layers; ``"not quantized"`` if there are none.
        layers: Number of those.
        tensors: Number of all tensors.
        size: Bytes of all tensors.
        notes: What of the checkpoint is read to floating point or left out.
    """

    format: str
    layers: int
    tensors: int
    size: int
    notes: list[str]


def verify(folder: Path, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Verified:
    """Check a local checkpoint.

    Args:
        folder: Where it is.
        progress: Wraps the list of layers.

    Raises:
        HfQuantError: The first thing that is wrong; the message names file and tensor or field.
    """
    checkpoint = Checkpoint.open(folder)
    stored = quantization_of(folder, checkpoint.config)
    contents = Contents.of(checkpoint, stored) if stored is not None else None
    notes: list[str] = []
    if contents is not None:
        placed = place(skeleton(str(folder)), contents)
        notes = sorted({*placed.notes, *placed.dense.values()})
        for module in progress(list(contents.layers)):
            _check_layer(contents, module)
    for name in contents.rest if contents is not None else checkpoint.tensors:
        if checkpoint.tensors[name].is_float:
            _check_finite(f"{checkpoint.tensors[name].file.name}: tensor {name}", checkpoint.read(name))
    size = sum(info.nbytes for info in checkpoint.tensors.values())
    named = contents.format if contents is not None else "not quantized"
    return Verified(named, len(contents.layers) if contents is not None else 0, len(checkpoint.tensors), size, notes)


def _check_layer(contents: Contents, module: str) -> None:
    """Reading checks values; what comes out must be finite too."""
    read = contents.read(module)
    if isinstance(read, QuantizedTensor):
        zero = read.zero_point if read.scheme.real_zero else None
        if zero is not None:
            _check_finite(f"{module}: zero points", zero)
    else:
        _check_finite(module, read)


def _check_finite(name: str, tensor: Tensor) -> None:
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    bad = int((~wide.isfinite()).sum())
    if bad:
        raise CheckpointError(f"{name}: {bad} values are NaN or infinite")
