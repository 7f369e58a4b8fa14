"""What is published, byte for byte, and what must not be in it: secrets, names of this machine, anything that runs."""

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

STAYS = {"report.html"}  # what our own commands put beside a model for people, and nobody has to pull
_NAME = re.compile(r"[\w+ ().-]+(/[\w+ ().-]+)*", re.ASCII)
_PATH = re.compile(r"(?:/[\w.+ -]+){2,}/?|[A-Za-z]:[\\/].+|\\\\[\w.-]+\\.+|~[\w.-]*/.+", re.ASCII)
_VOCABULARY = re.compile(r"(tokenizer|vocab|added_tokens|special_tokens_map|tekken)[\w.-]*\.json")


@dataclass(frozen=True)
class Snapshot:
    """The content of everything that is uploaded: what was looked through is what goes, whatever happens to the folder.

    Attributes:
        folder: Where the files are.
        held: Path in the folder to the whole content of each file that is not weights.
        weights: Path to digest of each safetensors file, which is too large to hold.
        stamps: Path to what the file system says of each of them: another stamp means another content.
        headers: Path to what is before the tensors in each of them.
    """

    folder: Path
    held: Mapping[str, bytes]
    weights: Mapping[str, Digest]
    stamps: Mapping[str, tuple[int, int, int] | None]
    headers: Mapping[str, bytes]

    @property
    def names(self) -> list[str]:
        """Of all files."""
        return sorted([*self.held, *self.weights])

    @property
    def files(self) -> dict[str, Digest]:
        """Path to what it holds, of all files."""
        return dict(self.weights) | {name: digest_of(data) for name, data in self.held.items()}

    def plus(self, written: Mapping[str, bytes]) -> Snapshot:
        """The same with other files, or other contents of them."""
        return replace(self, held={**self.held, **written})

    def check_unchanged(self, written: Iterable[str] = ()) -> None:
        """Refuse where a file of the folder, those ``written`` aside, is no longer what was looked through.

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
    """Read everything that ``folder`` would publish; hidden files and what is in `STAYS` stay here.

    Raises:
        PushError: There is a link, a file of a kind that is not published, or a name that the Hub would not take.
        CheckpointError: A safetensors file is not exactly what the format asks for.
    """
    held: dict[str, bytes] = {}
    weights, stamps, headers = {}, {}, {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or name in STAYS or (path.is_dir() and not path.is_symlink()):
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
    """Why nothing of this name is read."""
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


# -- looking through --------------------------------------------------------------------------------------------------


def look_through(
    checked: Snapshot, secrets: Iterable[str] = (), known: Mapping[str, bytes] = MappingProxyType({})
) -> None:
    """Refuse what is of no published kind, holds a secret, or names a folder of this machine.

    Args:
        checked: Everything that is to be uploaded; of weights, the names and metadata are looked at.
        secrets: Words that must not be found, such as the token in use.
        known: Contents that this function has looked through before; the same object is not looked through again.

    Raises:
        PushError: Names the file and what kind of thing is in it, never the thing.
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
    """What is in a file that nobody else should read, or None."""
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
    """Folders of this machine that nothing published should name; one as short as ``/tmp`` says nothing."""
    places = {str(folder.resolve().parent), str(Path.cwd())}
    return {place for place in places if place.count(os.sep) >= 2} | {f"{Path.home()}{os.sep}"} - {os.sep * 2}
