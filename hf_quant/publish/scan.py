"""The exact content that is published, and a search for what must not be in it: secrets, names of this machine, code."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from hf_quant.disk.digests import Digest, digest, digest_of
from hf_quant.disk.safetensors import read_header
from hf_quant.errors import PushError
from hf_quant.publish import file_kinds
from hf_quant.publish.decoding import strings_of, views
from hf_quant.publish.secrets import secret_in

STAYS = re.compile(  # written by this package for people beside a model, and not published
    r"report\.html|(size_and_kl|sensitivity)-(light|dark)\.png"
)
_NAME = re.compile(r"[\w+ ().-]+(/[\w+ ().-]+)*", re.ASCII)
_PATH = re.compile(r"(?:/[\w.+ -]+){2,}/?|[A-Za-z]:[\\/].+|\\\\[\w.-]+\\.+|~[\w.-]*/.+", re.ASCII)
_VOCABULARY = re.compile(r"(tokenizer|vocab|added_tokens|special_tokens_map|tekken)[\w.-]*\.json")


@dataclass(frozen=True)
class Snapshot:
    """The content of everything that is uploaded: changes in the folder after the checks have no effect on it.

    Attributes:
        folder: Where the files are.
        held: Path in the folder to the content of each file that does not hold weights.
        weights: Path to digest of each safetensors file, which is too large to keep in memory.
        stamps: Path to the file system's metadata of each of them, which changes with the content.
        headers: Path to the part before the tensors of each of them.
    """

    folder: Path
    held: Mapping[str, bytes]
    weights: Mapping[str, Digest]
    stamps: Mapping[str, tuple[int, int, int] | None]
    headers: Mapping[str, bytes]

    @property
    def names(self) -> list[str]:
        """Names of all files."""
        return sorted([*self.held, *self.weights])

    @property
    def files(self) -> dict[str, Digest]:
        """Path to digest of all files."""
        return dict(self.weights) | {name: digest_of(data) for name, data in self.held.items()}

    def plus(self, written: Mapping[str, bytes]) -> Snapshot:
        """The same snapshot with files added or replaced."""
        return replace(self, held={**self.held, **written})

    def check_unchanged(self, written: Iterable[str] = ()) -> None:
        """Refuse if a file of the folder, except those ``written``, has changed since the snapshot.

        Raises:
            PushError: Names the file.
        """
        changed = [name for name, stamp in self.stamps.items() if _stamp(self.folder / name) != stamp]
        for name in self.held.keys() - set(written):
            path = self.folder / name
            if path.is_symlink() or not path.is_file() or path.read_bytes() != self.held[name]:
                changed.append(name)
        if changed:
            raise PushError(f"{min(changed)} was changed while it was being published; start again")


def snapshot(folder: Path) -> Snapshot:
    """Read everything in ``folder`` that would be published; hidden files and those in `STAYS` are left out.

    Raises:
        PushError: There is a link, a file of a kind that is not published, or a name that the Hub does not allow.
        CheckpointError: A safetensors file violates the format.
    """
    held: dict[str, bytes] = {}
    weights, stamps, headers = {}, {}, {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or STAYS.fullmatch(name) or (path.is_dir() and not path.is_symlink()):
            continue
        if (refusal := _refusal(path, name)) is not None:
            raise PushError(f"{name}: {refusal}; it is not published")
        if path.suffix.lower() != file_kinds.WEIGHTS:
            held[name] = path.read_bytes()
            continue
        read_header(path)
        stamps[name], weights[name], headers[name] = _stamp(path), digest(path), _header(path)
    return Snapshot(folder, held, weights, stamps, headers)


def _refusal(path: Path, name: str) -> str | None:
    """Why a file of this name is not read."""
    if path.is_symlink() or not path.is_file():
        return "not a regular file"
    if not _NAME.fullmatch(name):
        return "its name holds odd characters"
    if (refusal := file_kinds.why_not_named(name)) is not None:
        return refusal
    if path.suffix.lower() != file_kinds.WEIGHTS and (size := path.stat().st_size) > file_kinds.LARGEST:
        return f"{size} bytes, more than the {file_kinds.LARGEST} of a file that is not weights"
    return None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(8)
        return start + file.read(struct.unpack("<Q", start)[0])


# -- search -----------------------------------------------------------------------------------------------------------


def look_through(
    checked: Snapshot, secrets: Iterable[str] = (), known: Mapping[str, bytes] = MappingProxyType({})
) -> None:
    """Refuse files of a kind that is not published, secrets, and names of folders of this machine.

    Args:
        checked: Everything that would be uploaded; of weights, names and metadata are searched.
        secrets: Strings that must not occur, such as the token in use.
        known: Contents that were searched before; the same object is not searched again.

    Raises:
        PushError: Names the file and the kind of secret, but not the secret.
    """
    words = {secret: "the token in use" for secret in secrets if secret}
    words |= dict.fromkeys(_places(checked.folder), "the name of a folder of this machine")
    for name, data in {**checked.held, **checked.headers}.items():
        if known.get(name) is data:
            continue
        if name in checked.held and (refusal := file_kinds.why_not(name, data)) is not None:
            raise PushError(f"{name}: {refusal}; it is not published")
        if (kind := _private(name, data, words)) is not None:
            raise PushError(f"{name}: holds {kind}")


def _private(name: str, data: bytes, words: Mapping[str, str]) -> str | None:
    """The kind of private content in a file, or None."""
    if not _VOCABULARY.fullmatch(Path(name).name) and Path(name).suffix.lower() == ".json":
        for string in strings_of(name, data) or []:
            if _PATH.fullmatch(string):
                return "a path of some machine"
    for text in views(name, data):
        if (kind := secret_in(text)) is not None:
            return kind
        for word, what in words.items():
            if word in text:
                return what
    return None


def _places(folder: Path) -> set[str]:
    """Folders of this machine that must not be named in what is published; ``/tmp`` and the like identify nothing."""
    places = {str(folder.resolve().parent), str(Path.cwd())}
    return {place for place in places if place.count(os.sep) >= 2} | {f"{Path.home()}{os.sep}"} - {os.sep * 2}
