"""SHA-256 of files, and the manifest of a published folder, which lists them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_quant.errors import CheckpointError

CONFIG, MANIFEST = "config.json", "manifest.json"
MAX_BYTES = 10_000_000  # of a manifest
CHUNK = 2**22
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Digest:
    """Identifies the content of a file.

    Attributes:
        bytes: Size of the file.
        sha256: In hexadecimal.
        git: SHA-1 of the file as a git blob, which is what the Hub has for small files; empty if it was not computed.
    """

    bytes: int
    sha256: str
    git: str = ""


def digest(path: Path) -> Digest:
    """The digest of a file, which is read once."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            git.update(chunk)
    return Digest(size, sha256.hexdigest(), git.hexdigest())


def digest_of(data: bytes) -> Digest:
    """The digest of bytes in memory."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return Digest(len(data), hashlib.sha256(data).hexdigest(), git.hexdigest())


def digests(folder: Path, names: Iterable[str]) -> dict[str, Digest]:
    """The digests of several files, computed in parallel."""
    names = sorted(names)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda name: digest(folder / name), names), strict=True))


def measured_files(folder: Path) -> list[dict[str, Any]]:
    """The files of ``folder`` that decide what its model computes, for results.json: measurements are valid for these bytes."""
    names = {path.name for path in folder.glob("*.safetensors")} | {CONFIG} & {path.name for path in folder.iterdir()}
    return listed(digests(folder, names))


def listed(files: Mapping[str, Digest]) -> list[dict[str, Any]]:
    """The files of `measured_files`, of a folder with these digests."""
    return [
        {"name": name, "bytes": file.bytes, "sha256": file.sha256}
        for name, file in sorted(files.items())
        if "/" not in name and (name == CONFIG or name.endswith(".safetensors"))
    ]


def same_files(known: Any, files: list[dict[str, Any]]) -> bool:
    """Whether ``files`` are those of a results.json; in the first versions config.json was not one of them."""
    without = [file for file in files if file["name"] != CONFIG]
    return bool(known in (files, without))


def read_manifest(path: Path) -> dict[str, Digest]:
    """File name to digest.

    Raises:
        CheckpointError: It is not a manifest.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path.name}: more than {MAX_BYTES} bytes")
        stored = json.loads(path.read_text(encoding="utf-8"))
        files = {name: Digest(entry["bytes"], entry["sha256"]) for name, entry in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not a manifest: {type(error).__name__}: {error}") from None
    for name, entry in files.items():
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise CheckpointError(f"{path.name}: {name!r} is not a path inside the folder")
        if type(entry.bytes) is not int or not isinstance(entry.sha256, str) or not _SHA256.fullmatch(entry.sha256):
            raise CheckpointError(f"{path.name}: {name!r} has no size and sha256")
    return files


def mismatches(folder: Path, expected: Mapping[str, Digest]) -> list[str]:
    """A sentence for every file of ``expected`` that is missing from ``folder`` or has another content."""
    problems, sized = [], []
    for name, wanted in sorted(expected.items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != wanted.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {wanted.bytes}")
        else:
            sized.append(name)
    for name, actual in digests(folder, sized).items():
        if actual.sha256 != expected[name].sha256:
            problems.append(f"{name} has sha256 {actual.sha256}, {MANIFEST} says {expected[name].sha256}")
    return problems
