"""The safetensors format: headers are checked before memory is allocated, and files are written without a copy.

Every refusal is a `CheckpointError` that names the file and the tensor.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant.disk.atomic import blaming, need_space
from hf_quant.disk.paths import size_of_regular_file
from hf_quant.disk.strict_json import MAX_BYTES, parsed, shown
from hf_quant.errors import CheckpointError

MAX_TENSORS = 200_000
MAX_AXES = 8
MAX_AXIS = 2**48
_NAME = re.compile(r"[\x21-\x7e]{1,512}")
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


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is and what it looks like, from its file's header.

    Attributes:
        file: The file, by the path it was opened with.
        dtype: As safetensors spells it, for example ``"BF16"``.
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
        """Whether its dtype is a floating-point type."""
        return self.dtype.startswith(("F", "BF"))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors in a safetensors file, from its header; the data is not read.

    Args:
        path: A regular file.

    Returns:
        Name to `TensorInfo`, in the order of the header.

    Raises:
        CheckpointError: The file violates the safetensors format.
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
    size = size_of_regular_file(path, path.name)
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path.name}: truncated: {size} bytes hold no header")
        if prefix == b"version ":
            raise CheckpointError(
                f"{path.name}: a pointer of Git LFS stands in place of the file: git lfs pull fetches it"
            )
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; only tensors that are not contiguous are copied.

    The library's own writer leaves a temporary file behind when it is killed, makes the file readable for its owner only, and
    does not name the file when the disk is full.

    Raises:
        DiskError: Names the file.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
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
