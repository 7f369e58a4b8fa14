"""A GGUF file: its metadata and where its tensors are, every number checked before memory is allocated.

A file may come from a stranger. Counts and lengths are held against the bytes that are there, so that a header takes no more
memory than a small multiple of its own size. Every refusal is a `CheckpointError` that names the file and the field or tensor.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hf_quant.disk.paths import size_of_regular_file
from hf_quant.disk.strict_json import shown
from hf_quant.errors import CheckpointError, FormatError
from hf_quant.gguf.blocks import BLOCKS, Block, check

MAX_HEADER = 1 << 28  # bytes of metadata
MAX_KEYS, MAX_TENSORS, MAX_STRINGS, MAX_AXES, MAX_AXIS = 1 << 16, 1 << 17, 1 << 21, 4, 1 << 40
FLOATS = {"F32": (0, torch.float32), "F16": (1, torch.float16), "BF16": (30, torch.bfloat16)}
OTHERS = {  # types that are not read, by the names of ggml.h
    7: "Q5_1", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_NAME = re.compile(r"[\x21-\x7e]{1,256}")
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Attributes:
        type: Name of its type.
        shape: As torch has it, the axis of blocks last.
        offset: Its first byte, from the start of the file.
        nbytes: Its size.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def block(self) -> Block | None:
        """The type of its blocks; None in floating point."""
        return BLOCKS.get(self.type)


@dataclass(frozen=True)
class File:
    """A file whose header was checked.

    Attributes:
        path: Where it is.
        metadata: Keys and values; arrays are lists.
        tensors: By name, in the order of the header.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, path: Path) -> File:
        """Read and check a header.

        Raises:
            CheckpointError: The file is damaged or contradicts itself, or holds what is not read here.
        """
        path = Path(path)
        size = size_of_regular_file(path, path.name)
        with path.open("rb") as file:
            return _Reader(path, file, size).read()

    def bytes_of(self, name: str) -> Tensor:
        """A tensor as stored, uint8 ``[N, bytes of a row]`` with all leading axes together.

        Raises:
            CheckpointError: Its scales are not finite numbers, or the file has changed.
        """
        stored = self.tensors[name]
        data = torch.empty(stored.nbytes, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(stored.offset)
            if file.readinto(data.numpy().data) != stored.nbytes:
                raise CheckpointError(f"{self.path.name}: tensor {name}: the file has become shorter")
        rows = data.view(math.prod(stored.shape[:-1]), -1)
        if stored.block is not None:
            try:
                check(rows, stored.block)
            except FormatError as error:
                raise CheckpointError(f"{self.path.name}: tensor {name}: {error}") from None
        return rows

    def floats(self, name: str) -> Tensor:
        """A tensor in floating point, in its own type.

        Raises:
            CheckpointError: It is quantized, or the file has changed.
        """
        stored = self.tensors[name]
        if stored.type not in FLOATS:
            raise CheckpointError(f"{self.path.name}: tensor {name}: {stored.type}, expected {', '.join(FLOATS)}")
        return self.bytes_of(name).view(FLOATS[stored.type][1]).view(stored.shape)


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.at = path, file, size, 0
        self.readers: dict[int, Callable[[str], Any]] = {_STRING: self.string, _ARRAY: self.array}

    def read(self) -> File:
        if self.take(4, "magic") != b"GGUF":
            raise self.refused("it does not start with GGUF")
        version = self.number("<I", "version")
        if version not in (2, 3):
            big = version >= 1 << 16 and version & 0xFFFF == 0
            raise self.refused(
                f"version {version}" + (", of a big-endian machine" if big else "") + "; 2 and 3 are read"
            )
        tensors = self.count("number of tensors", MAX_TENSORS, 24)
        metadata: dict[str, Any] = {}
        for _ in range(self.count("number of keys", MAX_KEYS, 13)):
            key = self.string("a key")
            if not _NAME.fullmatch(key) or key in metadata:
                raise self.refused(f"key {shown(key)} {'stands twice' if key in metadata else 'is not allowed'}")
            metadata[key] = self.value(self.number("<I", key), key)
        if metadata.get("split.count", 1) not in (0, 1):
            raise self.refused("one of several parts: join them with llama-gguf-split --merge")
        infos = self.infos(tensors)
        return File(self.path, metadata, self.placed(infos, self.alignment(metadata)))

    def infos(self, count: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Name to type, shape, and offset from the start of the data."""
        infos: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self.string("name of a tensor")
            if not _NAME.fullmatch(name) or ".." in name or name in infos:
                raise self.refused(
                    f"tensor {shown(name)} {'stands twice' if name in infos else 'has a name that is not allowed'}"
                )
            axes = self.number("<I", f"axes of {name}")
            if not 1 <= axes <= MAX_AXES:
                raise self.refused(f"tensor {name}: {axes} axes, from 1 to {MAX_AXES} are read")
            shape = tuple(self.number("<Q", f"shape of {name}") for _ in range(axes))[::-1]
            if any(not 1 <= axis <= MAX_AXIS for axis in shape):
                raise self.refused(f"tensor {name}: shape {list(shape)}")
            infos[name] = (
                self.type(name, self.number("<I", f"type of {name}")),
                shape,
                self.number("<Q", f"offset of {name}"),
            )
        return infos

    def type(self, name: str, number: int) -> str:
        for known, (its, _) in FLOATS.items():
            if its == number:
                return known
        block = next((block.name for block in BLOCKS.values() if block.number == number), None)
        if block is None:
            raise self.refused(
                f"tensor {name}: type {OTHERS.get(number, number)} is not read; {', '.join([*FLOATS, *BLOCKS])} are"
            )
        return block

    def placed(self, infos: dict[str, tuple[str, tuple[int, ...], int]], alignment: int) -> dict[str, Stored]:
        """The tensors, none of which leaves the file or meets another."""
        start = -(-self.at // alignment) * alignment
        tensors, end, last = {}, start, "the header"
        for name, (kind, shape, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
            block = BLOCKS.get(kind)
            if block is not None and shape[-1] % block.weights:
                raise self.refused(f"tensor {name}: rows of {shape[-1]} do not divide into blocks of {block.weights}")
            rows = math.prod(shape[:-1])
            nbytes = rows * (
                shape[-1] // block.weights * block.size if block else shape[-1] * FLOATS[kind][1].itemsize
            )
            if offset % alignment or start + offset < end:
                raise self.refused(f"tensor {name}: offset {offset} is not aligned, or overlaps {last}")
            end, last = start + offset + nbytes, name
            if end > self.size:
                raise self.refused(f"tensor {name}: it ends at byte {end}, the file at {self.size}: truncated")
            tensors[name] = Stored(kind, shape, start + offset, nbytes)
        return {name: tensors[name] for name in infos}

    def alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or not 8 <= value <= 1 << 20 or value & (value - 1):
            raise self.refused(f"general.alignment {shown(value)}: must be a power of two")
        return value

    def value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], key)
        if kind not in self.readers:
            raise self.refused(f"key {key}: there is no type {kind}")
        return self.readers[kind](key)

    def array(self, key: str) -> list[Any]:
        kind = self.number("<I", key)
        if kind == _STRING:
            return [self.string(key) for _ in range(self.count(f"length of {key}", MAX_STRINGS, 8))]
        if kind not in _NUMBERS:
            raise self.refused(f"key {key}: an array of type {kind}")
        width = struct.calcsize(_NUMBERS[kind])
        count = self.count(f"length of {key}", MAX_STRINGS, width)
        return list(struct.unpack(f"<{count}{_NUMBERS[kind][1]}", self.take(count * width, key)))

    def string(self, key: str) -> str:
        raw = self.take(self.number("<Q", key), key)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.refused(f"{key}: a string that is not UTF-8") from None

    def count(self, what: str, most: int, least: int) -> int:
        """How many of at least ``least`` bytes each follow."""
        count: int = self.number("<Q", what)
        if count > most or count * least > self.size - self.at:
            raise self.refused(f"{what}: {count}, which is more than the limit of {most} or than the file holds")
        return count

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at or self.at + count > MAX_HEADER:
            raise self.refused(
                f"{shown(what)}: {count} bytes at byte {self.at}, in a file of {self.size}: truncated or too large"
            )
        raw = self.file.read(count)
        if len(raw) != count:
            raise self.refused(f"{shown(what)}: truncated")
        self.at += count
        return raw

    def refused(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: {reason}")
