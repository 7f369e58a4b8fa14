"""Checkpoints on disk: what is in them is checked before anything is allocated.

A checkpoint may come from a stranger. Nothing of it is executed, no path in it may lead out of its folder, and every
number is checked before it is used. Every refusal is a `CheckpointError` that names the file and the tensor or field.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_quant.disk.atomic import blaming, need_space
from hf_quant.disk.strict_json import MAX_BYTES, MAX_VALUES, parsed, shown
from hf_quant.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG = 500_000  # values in config.json
MAX_TENSORS = 200_000
MAX_AXES = 8
MAX_AXIS = 2**48
SIZES_OF = {  # field of config.json to the integers it may hold; models without experts say zero of them
    "num_hidden_layers": (1, 1000),
    "n_layer": (1, 1000),
    "n_layers": (1, 1000),
    "num_layers": (1, 1000),
    "hidden_size": (1, 2**20),
    "n_embd": (1, 2**20),
    "d_model": (1, 2**20),
    "intermediate_size": (0, 2**22),
    "moe_intermediate_size": (0, 2**22),
    "vocab_size": (1, 2**24),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "n_head": (1, 2**14),
    "head_dim": (1, 2**16),
    "num_experts": (0, 2**16),
    "num_local_experts": (0, 2**16),
    "n_routed_experts": (0, 2**16),
}
MOST = (  # what other fields with such names may count, where they hold an integer
    (re.compile(r"(.*_)?(layers?|depth)"), 1000),
    (re.compile(r"(.*_)?experts"), 2**16),
    (re.compile(r"n_positions|.*max_.*positions?(_embeddings)?"), 2**26),
)
INNERMOST = 4  # how deep configs of parts are looked into
_PLAIN = re.compile(
    r"[a-z0-9_]+|None|\{.*\}", re.DOTALL
)  # of how attention is computed; a kernel on the Hub has a slash
_NAME = re.compile(r"[\x21-\x7e]{1,512}")
_SHARD = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,250}\.safetensors")
_NUMBERED = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_WIDTHS = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    2: ("I16", "U16", "F16", "BF16"),
    4: ("I32", "U32", "F32"),
    8: ("I64", "U64", "F64", "C64"),
}
SIZES = {dtype: size for size, dtypes in _WIDTHS.items() for dtype in dtypes}
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.int64: "I64", torch.uint64: "U64", torch.float64: "F64",
}  # fmt: skip
TORCH = {name: dtype for dtype, name in DTYPES.items()}
SCALE_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is and what it looks like, from its file's header.

    Attributes:
        file: The file, as it was named when opening.
        dtype: In safetensors' spelling, for example ``"BF16"``.
        shape: Its shape.
        offset: First byte, from the start of the file.
        nbytes: Size in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it is of a floating-point type."""
        return self.dtype.startswith(("F", "BF"))


# -- headers ------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What is in a safetensors file; the data itself is not read.

    Args:
        path: A regular file.

    Returns:
        Name to `TensorInfo`, in the order of the header.

    Raises:
        CheckpointError: The file is not exactly what the safetensors format asks for.
    """
    path = Path(path)
    raw, size = _raw_header(path)
    header = parsed(raw, path.name, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path.name}: __metadata__ must map strings to strings")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path.name}: {len(header)} tensors, the limit is {MAX_TENSORS}")
    tensors = {name: _tensor_info(path, name, entry, 8 + len(raw)) for name, entry in header.items()}
    end, last = 8 + len(raw), "header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            what = "overlaps" if info.offset < end else "leaves a gap after"
            raise CheckpointError(f"{path.name}: tensor {name} {what} {last}")
        end, last = info.offset + info.nbytes, name
    if end != size:
        what = "truncated" if end > size else "trailing bytes"
        raise CheckpointError(f"{path.name}: {what}: the tensors end at byte {end} ({last}), the file at {size}")
    return tensors


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The header's JSON text and the size of the file."""
    size = _regular(path, path.name)
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path.name}: truncated: {size} bytes hold no header")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_BYTES:
            raise CheckpointError(f"{path.name}: header of {length} bytes, the limit is {MAX_BYTES}")
        if length > size - 8:
            raise CheckpointError(f"{path.name}: truncated: header of {length} bytes in a file of {size}")
        raw = file.read(length)
    if len(raw) != length or raw[:1] != b"{":
        raise CheckpointError(f"{path.name}: header does not start with '{{'")
    return raw, size


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One entry of a header, checked by itself; ``start`` is the first byte of the data."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise CheckpointError(f"{path.name}: tensor name {shown(name)} is not allowed")
    where = f"{path.name}: tensor {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)}")
    if not _integers(shape, MAX_AXIS) or len(shape) > MAX_AXES:
        raise CheckpointError(f"{where}: bad shape {shown(shape)}")
    if not _integers(offsets, 2**62) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: bad data_offsets {shown(offsets)}")
    nbytes = math.prod(shape) * SIZES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} {shape} needs {nbytes} bytes, data_offsets give {offsets[1] - offsets[0]}"
        )
    return TensorInfo(path, dtype, tuple(shape), start + offsets[0], nbytes)


def _integers(value: Any, top: int) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= top for item in value)


# -- files and JSON -----------------------------------------------------------------------------------------------


def _regular(path: Path, name: str) -> int:
    """Size of a regular file; asked before opening, since opening a FIFO would wait for ever."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{name}: not a regular file")
    return status.st_size


def _inside(folder: Path, name: str) -> Path:
    """``folder / name``, which must stay in the folder or be a link as the Hugging Face cache makes them.

    There ``snapshots/<revision>/<name>`` points to ``blobs/<hash>`` beside ``snapshots``; and since huggingface_hub 2.4 that
    may point on, to ``blobs/<two digits>/<hash>`` of the whole cache.
    """
    path = folder / name
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    repos = [above.parent for above in home.parents if above.name == "snapshots"]
    blobs = {repo / "blobs" for repo in repos} | {repo.parent / "blobs" / target.name[:2] for repo in repos}
    if not target.is_relative_to(home) and target.parent not in blobs:
        raise CheckpointError(f"{name}: points outside the checkpoint folder")
    return path


FIELDS = ("quantization_config", "compression_config")  # of config.json; the second in older compressed-tensors


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of a local folder.

    Raises:
        CheckpointError: It is damaged, too large, or leads out of the folder.
    """
    path = _inside(folder, name)
    size = _regular(path, name)
    if size > MAX_BYTES:
        raise CheckpointError(f"{name}: {size} bytes, the limit is {MAX_BYTES}")
    return parsed(path.read_bytes(), name, values=MAX_CONFIG if name == "config.json" else MAX_VALUES)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a local folder.

    Raises:
        CheckpointError: It is damaged, or a number in it would make building the model endless; the message names the field.
    """
    config = read_json(folder, "config.json")
    check_config(config)
    return config


def check_config(config: Mapping[str, Any], where: str = "") -> None:
    """Refuse numbers that would make building the model endless, and a ``quantization_config`` that is no object.

    Args:
        config: config.json.
        where: Of an inner config, its name and a dot.

    Raises:
        CheckpointError: Names the field.
    """
    if not where:
        _check_numbers("", dict(config))
    for key, value in config.items():
        for item in value if isinstance(value, list) else [value]:  # some models have one value per layer
            _check_size(f"{where}{key}", key, item)
        if key.endswith(("attn_implementation", "experts_implementation")) and not _PLAIN.fullmatch(str(value)):
            raise CheckpointError(
                f"config.json: {where}{key} {shown(value)}: kernels from elsewhere are code, and not run"
            )
    for name in FIELDS:
        if (quantization := config.get(name)) is not None and not isinstance(quantization, dict):
            raise CheckpointError(f"config.json: {where}{name} must be an object, got {shown(quantization)}")
    for key, value in config.items():
        if where.count(".") < INNERMOST and key.endswith("_config") and isinstance(value, dict):
            check_config(value, f"{where}{key}.")


def _check_numbers(field: str, value: Any) -> None:
    """No number is NaN; infinite ones are limits that are none, in some models."""
    if value != value:
        raise CheckpointError(f"config.json: {shown(field)[1:-1]} is NaN")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        _check_numbers(f"{field}.{key}" if field else str(key), item)


def _check_size(field: str, key: str, value: Any) -> None:
    if key in SIZES_OF:
        least, most = SIZES_OF[key]
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise CheckpointError(
                f"config.json: {shown(field)[1:-1]} must be an integer from {least} to {most}, got {shown(value)}"
            )
    elif type(value) is int and value > 1000:
        most = min((most for name, most in MOST if name.fullmatch(key)), default=value)
        if value > most:
            raise CheckpointError(f"config.json: {shown(field)[1:-1]} is {shown(value)}, the limit is {most}")


# -- checkpoints --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights whose headers have been checked.

    Attributes:
        folder: Where it is.
        config: config.json; empty where only the weights were asked for.
        tensors: Every tensor by name.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Check config.json and every header of a local folder.

        Raises:
            CheckpointError: Something is damaged, contradictory, or leads out of the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder")
        config = read_config(folder)
        single, index = (os.path.lexists(folder / name) for name in (WEIGHTS, INDEX))
        if single and index:
            raise CheckpointError(f"both {WEIGHTS} and {INDEX} are there: remove the one that is out of date")
        if index:
            return cls(folder, config, _indexed(folder, INDEX))
        if single:
            return cls(folder, config, read_header(_inside(folder, WEIGHTS)))
        raise CheckpointError(_why_nothing(folder))

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Checkpoint:
        """Check the headers of files that transformers has already chosen.

        Args:
            files: One file, or all shards of one index; as named, links not followed.

        Raises:
            CheckpointError: Something is damaged, contradictory, or leads out of the folder.
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
        return cls(folder, {}, read_header(_inside(folder, files[0].name)))

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            CheckpointError: There is none of that name, or the file changed since it was checked.
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
    """The tensors of all shards of an index, which must say exactly where each one is."""
    weight_map = _weight_map(folder, index)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, info in read_header(_inside(folder, shard)).items():
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
    """The index that lists exactly these files; None if there is no index and need be none."""
    found = sorted(path.name for path in folder.glob("*.safetensors.index*.json"))
    for index in found:
        if set(_weight_map(folder, index).values()) == names:
            return index
    if found and (len(names) > 1 or _NUMBERED.search(min(names))):
        raise CheckpointError(f"{found[0]}: does not list exactly the files to load, {sorted(names)[:4]}")
    return None


def _refuse_climbing(files: Sequence[Path]) -> None:
    """Where the given paths look as if an index led elsewhere, let that index be the one to complain."""
    for file in files:
        for i, part in enumerate(file.parts):
            folder = Path(*file.parts[:i])
            if part == ".." and i and (folder / INDEX).is_file():
                _weight_map(folder, INDEX)
    for folder in sorted({file.parent for file in files}):
        if len(files) > 1 and (folder / INDEX).is_file():
            _weight_map(folder, INDEX)


# -- writing ------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, with nothing copied in memory but what is not contiguous.

    The library's own writer leaves a file of another name behind when it is killed, lets only the owner read what it
    writes, and does not say which file a disk had no room for.

    Raises:
        DiskError: Names the file.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that every one is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # a single key: the library shuffles several
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + end
    need_space(path, size)
    with blaming(path, size), path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
