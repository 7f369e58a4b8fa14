"""Checkpoints on disk: their content is checked before memory is allocated.

A checkpoint may come from an untrusted source. No code in it is executed, no path in it may lead out of its folder, and
every number is checked before use. Every refusal is a `CheckpointError` that names the file and the tensor or field.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from hf_quant.checkpoint.config import read_config, read_json
from hf_quant.disk.paths import inside
from hf_quant.disk.safetensors import TensorInfo, read_header
from hf_quant.disk.strict_json import shown
from hf_quant.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,250}\.safetensors")
_INDEX = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,250}\.safetensors\.index\.json")
_NUMBERED = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights with checked headers.

    Attributes:
        folder: The folder.
        config: config.json; empty if only the weights were opened.
        tensors: All tensors by name.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Check config.json and every header of a local folder.

        Raises:
            CheckpointError: A file is damaged, contradictory, or outside of the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder")
        config = read_config(folder)
        if (named := config.get("transformers_weights")) is not None:
            return cls(folder, config, _named(folder, named))
        single, index = (os.path.lexists(folder / name) for name in (WEIGHTS, INDEX))
        if single and index:
            raise CheckpointError(f"both {WEIGHTS} and {INDEX} are there: remove the one that is out of date")
        if index:
            return cls(folder, config, _indexed(folder, INDEX))
        if single:
            return cls(folder, config, read_header(inside(folder, WEIGHTS)))
        raise CheckpointError(_why_nothing(folder))

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Checkpoint:
        """Check the headers of files that transformers has already chosen.

        Args:
            files: One file, or all shards of one index, by their paths in the folder; links are not followed.

        Raises:
            CheckpointError: A file is damaged, contradictory, or outside of the folder.
        """
        files = [Path(file) for file in files]
        if not files:
            raise CheckpointError("no weight files")
        _refuse_climbing(files)
        folder = files[0].parent
        for file in files:
            if file.suffix != ".safetensors":
                raise CheckpointError(f"{file.name}: only safetensors is read; pickled weights can run code")
            if file.parent != folder or not _SHARD.fullmatch(file.name):
                raise CheckpointError(f"{file}: not a plain file name in {folder}, where the other weights are")
        names = {file.name for file in files}
        index = _index_for(folder, names)
        if index is not None:
            return cls(folder, {}, _indexed(folder, index))
        if len(names) > 1 or _NUMBERED.search(files[0].name):
            raise CheckpointError(f"{INDEX}: missing, but {files[0].name} is one of several shards")
        return cls(folder, {}, read_header(inside(folder, files[0].name)))

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            CheckpointError: There is no tensor of that name, or the file has changed since it was checked.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint")
        try:
            if info.file not in self._handles:
                self._handles[info.file] = safe_open(info.file, framework="pt")
            tensor: Tensor = self._handles[info.file].get_tensor(name)
        except Exception as error:  # of the safetensors library: it has its own type, and OSError
            raise CheckpointError(f"{info.file.name}: tensor {name}: {error}") from None
        return tensor


def _named(folder: Path, named: Any) -> dict[str, TensorInfo]:
    """The tensors of the file that config.json names, which transformers loads before any other."""
    if isinstance(named, str) and _INDEX.fullmatch(named):
        return _indexed(folder, named)
    if isinstance(named, str) and _SHARD.fullmatch(named):
        return read_header(inside(folder, named))
    raise CheckpointError(
        f"config.json: transformers_weights is {shown(named)}, not the plain name of a .safetensors file or of its "
        ".safetensors.index.json"
    )


def _why_nothing(folder: Path) -> str:
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        return f"{pickled[0]}: only safetensors is read; pickled weights can run code"
    return f"{folder}: neither {WEIGHTS} nor {INDEX} is there"


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    stored = read_json(folder, index)
    weight_map = stored.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be a non-empty object, got {shown(weight_map)}")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{index}: weight_map[{shown(tensor)}] is {shown(shard)}, not a plain .safetensors file name"
            )
    if not isinstance(stored.get("metadata", {}), dict):
        raise CheckpointError(f"{index}: metadata must be an object, got {shown(stored['metadata'])}")
    return weight_map


def _indexed(folder: Path, index: str) -> dict[str, TensorInfo]:
    """The tensors of all shards of an index, which must list exactly the tensors of each."""
    weight_map = _weight_map(folder, index)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, info in read_header(inside(folder, shard)).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is both in {tensors[name].file.name} and in {shard}")
            if weight_map.get(name) != shard:
                says = weight_map.get(name, "nothing of it")
                raise CheckpointError(f"{index}: tensor {name} is in {shard}, but the index says {says}")
            tensors[name] = info
    missing = next((name for name in weight_map if name not in tensors), None)
    if missing is not None:
        raise CheckpointError(f"{weight_map[missing]}: tensor {shown(missing)} of {index} is missing")
    return tensors


def _index_for(folder: Path, names: set[str]) -> str | None:
    """The index that lists exactly these files; None if there is none and none is needed."""
    indexes = sorted(path.name for path in folder.glob("*.safetensors.index*.json"))
    for index in indexes:
        if set(_weight_map(folder, index).values()) == names:
            return index
    if indexes and (len(names) > 1 or _NUMBERED.search(min(names))):
        raise CheckpointError(f"{indexes[0]}: does not list exactly the files to load, {sorted(names)[:4]}")
    return None


def _refuse_climbing(files: Sequence[Path]) -> None:
    """If the paths look as if an index led elsewhere, report the error of that index."""
    for file in files:
        for i, part in enumerate(file.parts):
            folder = Path(*file.parts[:i])
            if part == ".." and i and (folder / INDEX).is_file():
                _weight_map(folder, INDEX)
    for folder in sorted({file.parent for file in files}):
        if len(files) > 1 and (folder / INDEX).is_file():
            _weight_map(folder, INDEX)
