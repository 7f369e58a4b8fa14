"""sha256 of files, and the manifest of a published folder that says what they should be."""

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

MANIFEST = "manifest.json"
MAX_BYTES = 10_000_000  # of a manifest
CHUNK = 2**22
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file holds.

    Attributes:
        bytes: Its size.
        sha256: In hexadecimal.
        git: sha1 that git gives it, which is all the Hub knows of a small file; empty where nobody computed it.
    """

    bytes: int
    sha256: str
    git: str = ""


def digest(path: Path) -> Digest:
    """Of one file, read once."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            git.update(chunk)
    return Digest(size, sha256.hexdigest(), git.hexdigest())


def digest_of(data: bytes) -> Digest:
    """Of a content in memory."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return Digest(len(data), hashlib.sha256(data).hexdigest(), git.hexdigest())


def digests(folder: Path, names: Iterable[str]) -> dict[str, Digest]:
    """Of several files, on several cores."""
    names = sorted(names)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda name: digest(folder / name), names), strict=True))


def weight_files(folder: Path) -> list[dict[str, Any]]:
    """The safetensors files of ``folder`` for results.json: measured numbers belong to these very bytes."""
    found = digests(folder, (path.name for path in folder.glob("*.safetensors")))
    return [{"name": name, "bytes": each.bytes, "sha256": each.sha256} for name, each in found.items()]


def read_manifest(path: Path) -> dict[str, Digest]:
    """File name to digest.

    Raises:
        CheckpointError: It is not a manifest.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path.name}: more than {MAX_BYTES} bytes")
        stored = json.loads(path.read_text(encoding="utf-8"))
        made = {name: Digest(each["bytes"], each["sha256"]) for name, each in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not a manifest: {type(error).__name__}: {error}") from None
    for name, each in made.items():
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise CheckpointError(f"{path.name}: {name!r} is not a path inside the folder")
        if type(each.bytes) is not int or not isinstance(each.sha256, str) or not _SHA256.fullmatch(each.sha256):
            raise CheckpointError(f"{path.name}: {name!r} has no size and sha256")
    return made


def mismatches(folder: Path, expected: Mapping[str, Digest]) -> list[str]:
    """A sentence for every file of ``expected`` that is missing from ``folder`` or holds something else."""
    made, sized = [], []
    for name, want in sorted(expected.items()):
        path = folder / name
        if not path.is_file():
            made.append(f"{name} is missing")
        elif path.stat().st_size != want.bytes:
            made.append(f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {want.bytes}")
        else:
            sized.append(name)
    for name, have in digests(folder, sized).items():
        if have.sha256 != expected[name].sha256:
            made.append(f"{name} has sha256 {have.sha256}, {MANIFEST} says {expected[name].sha256}")
    return made
