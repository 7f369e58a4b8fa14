"""Work that survives being killed, and the machine losing power: finished parts, and a journal of them.

``OUT.work/`` holds a lock, ``journal.jsonl`` and one file a part. A part is written under a temporary name, synced, renamed,
and the folder synced; then one checksummed line is appended to the journal and synced. That line is the commit: a part
without it does not count, and a line is never changed. Whoever finds a damaged part appends a rewind before redoing it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_quant.checkpoint import fsync
from hf_quant.errors import HfQuantError

NAME, LOCK = "journal.jsonl", "LOCK"
VERSION = 1


@dataclass
class Journal:
    """Open, and locked against other processes.

    Attributes:
        folder: Where everything is.
        parts: Records of the finished parts, in order; each with ``file`` and ``sha256``, and whatever `add` was given.
    """

    folder: Path
    parts: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, write: Callable[[Path], None], record: Mapping[str, Any]) -> None:
        """Commit one part: when this returns, it stays.

        Args:
            name: Of its file.
            write: Writes the file of that path.
            record: What to remember about it, for JSON.
        """
        path = self.folder / name
        draft = path.with_name(f".{name}.tmp")
        try:
            write(draft)
            fsync(draft)
            draft.replace(path)
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        fsync(self.folder)
        entry = dict(record) | {"file": name, "sha256": digest(path)}
        self._append(entry)
        self.parts.append(entry)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self.folder / NAME).open("ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def _rewind(self, to: int) -> None:
        self._append({"rewind": to})
        del self.parts[to:]


@contextmanager
def journal(folder: Path, plan: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[Journal]:
    """Begin, or go on where the last process stopped.

    Args:
        folder: ``OUT.work``.
        plan: Everything that decides the result; going on under another one would mix two models.
        say: Told what is redone, and why.

    Raises:
        HfQuantError: Another process works there, the journal is damaged, or it belongs to another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        made = Journal(folder)
        entries = _read(folder / NAME)
        plan = json.loads(json.dumps(plan)) | {"version": VERSION}
        if not entries:
            made._append({"plan": plan})
            fsync(folder)
            fsync(folder.parent)
        else:
            _same(entries[0].get("plan"), plan, folder)
            for entry in entries[1:]:
                if "rewind" in entry:
                    del made.parts[entry["rewind"] :]
                else:
                    made.parts.append(entry)
            for i, part in enumerate(made.parts):
                path = folder / part["file"]
                if not path.is_file() or digest(path) != part["sha256"]:
                    say(f"{part['file']} is {'damaged' if path.is_file() else 'missing'}: going on from there")
                    made._rewind(i)
                    break
        yield made


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    made = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, sort_keys=True).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """All entries; a last line that was cut off by a crash never counted, and is taken away."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    entries = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        checksum, _, text = line.partition(b" ")
        if checksum != f"{zlib.crc32(text):08x}".encode():
            raise HfQuantError(f"{path}: line {number} is damaged; delete {path.parent} to begin anew")
        entries.append(json.loads(text))
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    return entries


def _same(found: Any, plan: Mapping[str, Any], folder: Path) -> None:
    if found != plan:
        found = found if isinstance(found, dict) else {}
        names = sorted(name for name in {*found, *plan} if found.get(name) != plan.get(name))
        raise HfQuantError(
            f"{folder} was begun with other settings ({', '.join(names)}); repeat them, or delete it to begin anew"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock; the system lets go of it when the process ends, however it ends."""
    import fcntl

    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise HfQuantError(f"{folder}: another process ({file.read().strip() or 'unknown'}) works there") from None
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield
