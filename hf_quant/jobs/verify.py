"""All checks of a checkpoint, one layer in memory at a time; the model is never loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from hf_quant.checkpoint.config import read_json
from hf_quant.checkpoint.contents import Contents, refuse_training
from hf_quant.checkpoint.folder import INDEX, Checkpoint
from hf_quant.core.layout import wrong_values
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.disk.digests import MANIFEST
from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.hf._compat import renamer
from hf_quant.hf.auto import CODE
from hf_quant.hf.community import Placed
from hf_quant.hf.foreign_tensors import parameters_of
from hf_quant.hf.loading import skeleton, stored_in, understood
from hf_quant.hf.preflight import check_float_checkpoint
from hf_quant.hf.quantizer import HfQuantQuantizer
from hf_quant.jobs.headers import not_there
from hf_quant.jobs.options import check_model
from hf_quant.jobs.progress import Bar, Say, reporting
from hf_quant.jobs.results import Result, Row, fields
from hf_quant.publish.manifest import verify_folder, verify_repo

NOT_QUANTIZED = "not quantized"


@dataclass(frozen=True, repr=False)
class VerifyResult(Result):
    """What `verify` looked at; all of it is sound, or else there is an error and no result.

    Attributes:
        model: Folder or Hub id.
        files: Number of files whose sha256 is that of the manifest; None where there is no manifest.
        format: Of the quantized layers, `NOT_QUANTIZED` if there are none; None for a Hub id, like all below.
        layers_quantized: Number of those.
        tensors: Number of all tensors.
        bytes: Of all tensors.
        notes: What of the checkpoint is read to floating point or left out.
    """

    model: str
    files: int | None
    format: str | None = None
    layers_quantized: int | None = None
    tensors: int | None = None
    bytes: int | None = None
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"sound": True, "files": self.files}
        if self.format is not None:
            record |= {
                "format": self.format, "layers_quantized": self.layers_quantized, "tensors": self.tensors,
                "bytes": self.bytes, "notes": list(self.notes),
            }  # fmt: skip
        return record

    def title(self) -> str:
        if self.format == NOT_QUANTIZED:
            return f"{self.model} is sound, and nothing in it is quantized"
        return f"{self.model} is sound"

    def rows(self) -> Iterator[Row]:
        without = "no manifest.json, since it was not published: sha256 sums were not compared"
        files = without if self.files is None else f"{self.files} files have the sha256 of manifest.json"
        yield "files", files
        yield from fields({name: value for name, value in self.to_dict().items() if name not in ("sound", "files")})


def verify(
    model: str | os.PathLike[str], *, revision: str | None = None, progress: bool | Bar = False, say: Say | None = None
) -> VerifyResult:
    """Make every check of a checkpoint, without loading the model; ``hf-quant verify``.

    Every file of its manifest is compared with the sha256 there; of a folder also headers, shapes, scales, zero points,
    orders of columns, and that all numbers are finite. One layer is in memory at a time, and nothing is executed.

    Args:
        model: Folder, or Hub id of a model that ``hf-quant push`` published.
        revision: Of a Hub model.
        progress: As for `quantize`.
        say: As for `quantize`.

    Raises:
        CheckpointError: The first thing that is wrong; the message names file and tensor or field.
        HfQuantError: There is no such model.
    """
    model = check_model(model, revision)
    with reporting(progress, say) as report:
        if not Path(model).is_dir():
            return VerifyResult(model, _verified_on_the_hub(model, revision))
        files = _verified_files(Path(model))
        verification = check_tensors(Path(model), report.over("layers"))
    return replace(verification, files=files)


def _verified_on_the_hub(model: str, revision: str | None) -> int:
    try:
        return verify_repo(model, revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError, LocalEntryNotFoundError) as error:
        raise HfQuantError(not_there(model, error)) from None


def _verified_files(folder: Path) -> int | None:
    """The number of files that are as the manifest says; None where there is none."""
    manifest = folder / MANIFEST
    if os.path.lexists(manifest) and not manifest.is_file():
        raise CheckpointError(f"{manifest}: is not a file, so there is nothing to check against")
    return verify_folder(folder) if manifest.is_file() else None


def check_tensors(folder: Path, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> VerifyResult:
    """Check config.json, headers and every tensor of a local checkpoint.

    Args:
        folder: Where it is.
        progress: Wraps the list of layers.

    Raises:
        HfQuantError: The first thing that is wrong; the message names file and tensor or field.
    """
    checkpoint = Checkpoint.open(folder)
    index = checkpoint.config.get("transformers_weights") or INDEX
    if index.endswith(".json") and (folder / index).is_file() and "metadata" not in read_json(folder, index):
        raise CheckpointError(f"{index}: metadata is missing, without which transformers loads no shards")
    model = _skeleton(checkpoint)
    stored = stored_in(model.config, folder)
    size = sum(info.nbytes for info in checkpoint.tensors.values())
    if stored is None:
        check_float_checkpoint(model, checkpoint)
        _check_numbers(model, checkpoint, progress(list(checkpoint.tensors)))
        return VerifyResult(str(folder), None, NOT_QUANTIZED, 0, len(checkpoint.tensors), size)
    refuse_training(folder, stored)
    quantizer = HfQuantQuantizer(understood(stored), pre_quantized=True)
    files = sorted({str(info.file) for info in checkpoint.tensors.values()})
    contents = quantizer.prepare(model, files)  # what loading does first
    assert contents is not None
    for module in progress(list(contents.layers)):
        if module in quantizer.placed.homes:
            _check_layer(model, contents, quantizer.placed, module)
    _check_numbers(model, checkpoint, contents.rest)
    notes = sorted({*quantizer.placed.notes, *quantizer.placed.dense.values()})
    return VerifyResult(str(folder), None, contents.format, len(contents.layers), len(checkpoint.tensors), size, notes)


def _skeleton(checkpoint: Checkpoint) -> Any:
    try:
        return skeleton(str(checkpoint.folder), weights=checkpoint)
    except CheckpointError as error:
        if CODE not in str(error):
            raise
        raise CheckpointError(
            f"{checkpoint.folder}: its model is defined by code in the checkpoint, which verify never runs, so its tensors "
            "cannot be checked; hf_quant.load(..., trust_remote_code=True) checks them as it loads, where you trust the code"
        ) from None


def _check_layer(model: Any, contents: Contents, placed: Placed, module: str) -> None:
    """One layer becomes what it becomes while loading, and is checked as it is there."""
    home = placed.homes[module]
    read = contents.read(module, dense=home not in placed.schemes)
    names = dict(model.named_parameters())
    if isinstance(read, QuantizedTensor):
        stem = home if f"{home}_scale" in names else f"{home}.weight"
        stored_parameters = parameters_of(stem, read, names[f"{stem}_scale"].dtype)
        parameters = {f"weight{name.removeprefix(stem)}": tensor for name, tensor in stored_parameters.items()}
        wrong = wrong_values(parameters, read.scheme, read.in_features)
        if wrong is not None:
            raise CheckpointError(f"{contents.where(module)}: {wrong}")
    else:
        target = names.get(home, names.get(f"{home}.weight"))
        _check_finite(contents.where(module), read if target is None else read.to(target.dtype))


def _check_numbers(model: Any, checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Every number that arrives in the model is finite, in the type that it has there."""
    rename, parameters = renamer(model), dict(model.named_parameters())
    for name in names:
        target = parameters.get(rename(name)[0])
        if target is not None and target.is_floating_point():
            _check_finite(
                f"{checkpoint.tensors[name].file.name}: tensor {name}", checkpoint.read(name).to(target.dtype)
            )


def _check_finite(name: str, tensor: Tensor) -> None:
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise CheckpointError(f"{name}: {bad} values are NaN or infinite")
