"""Work that survives a kill of the process and a loss of power: finished parts, and a journal of them.

``OUT.work/`` holds a lock, ``journal.jsonl`` and one file for each part. A part is written under a temporary name, synced and
renamed, and the folder is synced; then a line with a checksum is appended to the journal and synced. That line is the commit:
a part without a line does not count. A process that resumes first writes a new copy of the journal without damaged lines,
since the disk may have any part of a file whose writer was killed or whose sync failed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_quant.disk.atomic import blaming, make_folder, put
from hf_quant.disk.locks import locked
from hf_quant.errors import DiskError, HfQuantError

NAME, LOCK = "journal.jsonl", "LOCK"
VERSION = 2


@dataclass
class Journal:
    """An open journal, locked against other processes.

    Attributes:
        folder: ``OUT.work``.
        parts: Records of the finished parts, in order, each with ``number`` (its index), ``file``, ``sha256`` and what `add` was
            given.
        broken: Whether writing a line has failed; nothing is appended after that.
        plan: All settings that affect the result.
    """

    folder: Path
    parts: list[dict[str, Any]] = field(default_factory=list)
    broken: bool = False
    plan: Mapping[str, Any] = field(default_factory=dict)

    def add(self, name: str, write: Callable[[Path], None], record: Mapping[str, Any]) -> None:
        """Commit a part: when this returns, it is on disk.

        Args:
            name: Name of its file.
            write: Writes the file at the path that it receives.
            record: What to store about it, as JSON.

        Raises:
            DiskError: Names the file.
        """
        path = self.folder / name
        put(path, write)
        entry = _plain(dict(record) | {"number": len(self.parts), "file": name, "sha256": digest(path)})
        self._append(entry)
        self.parts.append(entry)

    def replace(self, name: str, write: Callable[[Path], None], record: Mapping[str, Any]) -> None:
        """Commit a part in place of all before it; at any time, the old one or the new one is on disk and counts.

        Args:
            name: Name of its file, another than before.
            write: Writes the file at the path that it receives.
            record: What to store about it, as JSON.

        Raises:
            DiskError: Names the file.
        """
        path = self.folder / name
        put(path, write)
        entry = _plain(dict(record) | {"number": 0, "file": name, "sha256": digest(path)})
        put(self.folder / NAME, lambda draft: draft.write_bytes(_line({"plan": self.plan}) + _line(entry)))
        for part in self.parts:
            (self.folder / part["file"]).unlink(missing_ok=True)
        self.parts = [entry]

    def _append(self, entry: Mapping[str, Any]) -> None:
        path = self.folder / NAME
        if self.broken:
            raise DiskError(f"{path}: a line could not be written before; begin again")
        self.broken = True  # until the line is complete
        with blaming(path), path.open("ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.broken = False


@contextmanager
def open_journal(folder: Path, plan: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[Journal]:
    """Begin a work folder, or resume one.

    Args:
        folder: ``OUT.work``.
        plan: All settings that affect the result; resuming with others would mix two models.
        say: Receives a message about what is redone, and why.

    Raises:
        HfQuantError: Another process works there, the journal is damaged, or it belongs to another plan.
    """
    make_folder(folder)
    with locked(folder / LOCK, folder):
        strange = [file.name for file in folder.iterdir() if not (file.name == LOCK or file.match(".*.tmp"))]
        if strange and not is_journal(folder):
            raise HfQuantError(
                f"{folder}: would be removed in the end, but holds {strange[0]} and no journal; move it away"
            )
        path, plan = folder / NAME, _plain(plan) | {"version": VERSION}
        entries = _read(path)
        if len(entries) > 1:  # without a part there is nothing that other settings could be mixed with
            _same(entries[0].get("plan"), plan, folder)
        parts = _sound(folder, _in_order(entries[1:], path), say)
        _clear(folder, {NAME, LOCK, *(part["file"] for part in parts)})
        lines = b"".join(map(_line, [{"plan": plan}, *parts]))
        put(path, lambda draft: draft.write_bytes(lines))
        yield Journal(folder, parts, plan=plan)


def is_journal(folder: Path) -> bool:
    """Whether a folder is a work folder of this package."""
    return (folder / NAME).is_file()


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Records of the finished parts in a folder that no process works in; their files are not checked.

    Raises:
        HfQuantError: The journal is damaged.
    """
    return _in_order(_read(folder / NAME)[1:], folder / NAME)


def digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        DiskError: It cannot be read.
    """
    sha256 = hashlib.sha256()
    with blaming(path), path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def _plain(obj: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, the order of keys included."""
    plain: dict[str, Any] = json.loads(json.dumps(obj, sort_keys=True))
    return plain


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, sort_keys=True).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """All entries; an incomplete line at the end, from a crash or a loss of power, does not count."""
    if not path.exists():
        return []
    with blaming(path):
        lines = path.read_bytes().split(b"\n")
    parsed_lines = [_entry(line) for line in lines]
    end = max((i + 1 for i, entry in enumerate(parsed_lines[:-1]) if entry is not None), default=0)
    entries = [entry for entry in parsed_lines[:end] if entry is not None]
    if len(entries) < end:
        raise HfQuantError(
            f"{path}: line {parsed_lines.index(None) + 1} is damaged; delete {path.parent} to begin anew"
        )
    return entries


def _entry(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != f"{zlib.crc32(text):08x}".encode():
        return None
    entry: dict[str, Any] = json.loads(text)
    return entry


def _in_order(parts: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The parts, after checking that each names its number and a file beside the journal."""
    for i, part in enumerate(parts):
        name = part.get("file")
        if part.get("number") != i or not isinstance(name, str) or Path(name).name != name:
            raise HfQuantError(f"{path}: line {i + 2} is not that of part {i}; delete {path.parent} to begin anew")
    return parts


def _sound(folder: Path, parts: list[dict[str, Any]], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The parts before the first one whose file is missing or damaged: later parts were computed from it."""
    for i, part in enumerate(parts):
        file = folder / part["file"]
        if not file.is_file() or digest(file) != part["sha256"]:
            say(f"{part['file']} is {'damaged' if file.is_file() else 'missing'}: going on from there")
            return parts[:i]
    return parts


def _clear(folder: Path, keep: set[str]) -> None:
    """Remove what killed processes have left: temporary files, parts without a line, and scratch folders."""
    for leftover in folder.iterdir():
        if leftover.name not in keep:
            with blaming(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _same(recorded_plan: Any, plan: Mapping[str, Any], folder: Path) -> None:
    if recorded_plan != plan:
        recorded_plan = recorded_plan if isinstance(recorded_plan, dict) else {}
        names = sorted(name for name in {*recorded_plan, *plan} if recorded_plan.get(name) != plan.get(name))
        raise HfQuantError(
            f"{folder} was begun with other settings ({', '.join(names)}); repeat them, or delete it to begin anew"
        )
