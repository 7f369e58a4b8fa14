"""A folder whose disk records, fails on demand, and can lose its power.

`Disk` stands between Python and the system while it is active: every operation that changes the folder is counted, noted,
and may be made to fail. `states` replays the notes up to some moment and then forgets what nobody had synced, in ways that
file systems are allowed to: contents of files (old, new, zeros, half, some pages), and entries of folders (none, the first
few, all, some). The rules are those of POSIX, not of one file system, which may keep more.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

KINDS = ("kill", "torn", "ENOSPC", "EIO")
GROWS = ("make", "write", "mkdir", "link")  # what a full disk refuses
PAGE = 512  # bytes; small, since the files are


class Killed(BaseException):
    """From here on the process does not exist: nothing that it does reaches the disk."""


@dataclass(frozen=True)
class Op:
    """One change. ``other`` is where a rename or a link leads, or what is exchanged."""

    kind: str
    path: str = ""
    other: str = ""
    data: bytes = b""
    offset: int = 0


@dataclass
class Disk:
    """Watches ``root``.

    Attributes:
        root: Folder.
        at: The operation that fails: its number, from 1, or how it stands in ``trace`` and for which time; 0 for none.
        kind: How: "kill" (before it), "torn" (after it, or in the midst of a write), "ENOSPC" (it and all that need room), "EIO".
        really: Die by SIGKILL, in a child process; otherwise by `Killed`, after which nothing is done any more.
        deaf: Syncs that are swallowed, by path and whether it is a folder: for protocols that forget them.
        log: What was done, in order.
        trace: Every operation so far, failed ones included, as "kind path".
        retried: Files that were synced again after that had failed.
    """

    root: Path
    at: int | tuple[str, int] = 0
    kind: str = ""
    really: bool = False
    deaf: Callable[[str, bool], bool] = lambda path, folder: False
    log: list[Op] = field(default_factory=list)
    base: dict[str, bytes | None] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)
    _failed: set[int] = field(default_factory=set)
    _handles: dict[int, str] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)
    _dead: bool = False
    _full: bool = False

    def __post_init__(self) -> None:
        self.root = Path(os.path.realpath(self.root))
        self.base = image(self.root)
        self._known = {".", *self.base}

    # -- what happens to an operation ---------------------------------------------------------------------------------

    def _do(
        self, kind: str, path: str, act: Callable[[], Any], *notes: Op, half: Callable[[], Any] | None = None
    ) -> Any:
        if self._dead:
            raise Killed
        self.trace.append(f"{kind} {path}")
        now = (self.trace[-1], self.trace.count(self.trace[-1])) if isinstance(self.at, tuple) else len(self.trace)
        fault = self.kind if now == self.at else ""
        if fault == "kill":
            self._die()
        self._full |= fault == "ENOSPC"
        if fault in ("ENOSPC", "EIO") or (self._full and kind in GROWS):
            if half:
                half()
            if kind == "sync":
                self.log.append(Op("lost", path))
                self._failed.add((self.root / path).stat().st_ino)
            code = getattr(errno, fault or "ENOSPC")
            name = () if kind in ("write", "sync") else (str(self.root / path),)
            raise OSError(code, os.strerror(code), *name)
        if fault == "torn" and half:
            half()
            self._die()
        made = None
        try:
            made = act()
            self.log += notes if made is not False else ()
        finally:
            if fault == "torn":
                if isinstance(made, io.FileIO):
                    made.close()
                self._die()
        return made

    def _die(self) -> None:
        if self.really:
            os.kill(os.getpid(), signal.SIGKILL)
        self._dead = True
        raise Killed

    def _inside(self, path: Any, folder: int | None = None) -> str | None:
        """A path relative to ``root``; None outside."""
        if isinstance(path, int):
            return self._handles.get(path)
        start = self.root / self._handles.get(folder, "..") if folder is not None else Path.cwd()
        name = os.path.normpath(start / os.fsdecode(path))
        return os.path.relpath(name, self.root) if f"{name}/".startswith(f"{self.root}/") else None

    def _discover(self, path: str) -> None:
        """Note what was written past Python: as data that nobody synced."""
        full = self.root / path
        paths = [full, *sorted(full.rglob("*"))] if full.is_dir() else [full]
        for each in paths:
            name = os.path.relpath(each, self.root)
            if name not in self._known:
                self._known.add(name)
                self.log += (
                    [Op("mkdir", name)]
                    if each.is_dir()
                    else [Op("make", name), Op("write", name, data=each.read_bytes())]
                )

    def _moved(self, old: str, new: str) -> None:
        self._known = {new + name[len(old) :] if f"{name}/".startswith(f"{old}/") else name for name in self._known}

    # -- the operations -----------------------------------------------------------------------------------------------

    def _opened(self, path: str, fresh: bool, act: Callable[[], Any]) -> Any:
        """Open for writing; ``fresh`` empties the file."""
        there = (self.root / path).exists()
        note = [] if there and not fresh else [Op("cut" if there else "make", path)]
        made = self._do("open" if there else "make", path, act, *note)
        self._known.add(path)
        return made

    def _write(self, path: str, data: bytes, offset: int, write: Callable[[bytes], int]) -> int:
        if self._dead:
            return len(data)  # a buffer is emptied while a file is closed

        def half() -> None:
            done = write(data[: len(data) // 2])
            self.log.append(Op("write", path, data=data[:done], offset=offset))

        made: int = self._do(
            "write", path, lambda: write(data), Op("write", path, data=data, offset=offset), half=half
        )
        return made

    def _sync(self, handle: int) -> None:
        path = self._handles.get(handle)
        if path is None:
            return
        if self._dead:
            raise Killed
        full = self.root / path
        if full.stat().st_ino in self._failed:
            self.retried.append(path)
        self._discover(path)
        notes = [] if self.deaf(path, full.is_dir()) else [Op("sync", path)]
        self._do("sync", path, lambda: None, *notes)

    def _rename(self, real: Callable[..., Any], old: Any, new: Any, kind: str = "rename") -> Any:
        one, two = self._inside(old), self._inside(new)
        if one is None or two is None:
            return real(old, new)
        if not self._dead:
            self._discover(one)
        made = self._do(kind, one, lambda: real(old, new), Op(kind, one, two))
        if kind == "rename":
            self._moved(one, two)
        elif kind == "link":
            self._known.add(two)
        elif made:
            for here, there in ((one, "\0"), (two, one), ("\0", two)):
                self._moved(here, there)
        return made

    def _remove(self, real: Callable[..., Any], kind: str, path: Any, **where: Any) -> Any:
        name = self._inside(path, where.get("dir_fd"))
        if name is None:
            return real(path, **where)
        made = self._do(kind, name, lambda: real(path, **where), Op(kind, name))
        self._known.discard(name)
        return made

    # -- in the place of Python's -------------------------------------------------------------------------------------

    def _fake_open(self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
                   newline: Any = None, closefd: bool = True, opener: Any = None) -> Any:  # fmt: skip
        path = None if isinstance(file, int) else self._inside(file)
        if path is None or not set(mode) & set("wax+"):
            made = REAL["open"](file, mode, buffering, encoding, errors, newline, closefd, opener)
            self._handles.pop(made.fileno(), None)
            return made
        raw = self._opened(path, "w" in mode, lambda: _Raw(file, mode.replace("b", "").replace("t", "")))
        raw.disk, raw.path = self, path
        self._handles[raw.fileno()] = path
        buffered: Any = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def _fake_os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = self._inside(path, dir_fd)

        def real() -> int:
            handle: int = REAL["os.open"](path, flags, mode, dir_fd=dir_fd)
            return handle

        if name is None:
            return real()
        handle: int = (
            self._opened(name, bool(flags & os.O_TRUNC), real) if flags & (os.O_WRONLY | os.O_RDWR) else real()
        )
        self._handles[handle] = name
        self._open.add(handle)
        return handle

    def _fake_os_close(self, handle: int) -> None:
        self._open.discard(handle)
        REAL["os.close"](handle)

    def _fake_os_write(self, handle: int, data: bytes) -> int:
        path = self._handles.get(handle) if handle in self._open else None
        if path is None:
            return REAL["os.write"](handle, data)  # type: ignore[no-any-return]
        return self._write(
            path, bytes(data), os.lseek(handle, 0, os.SEEK_CUR), lambda part: REAL["os.write"](handle, part)
        )

    def _fake_ftruncate(self, handle: int, size: int) -> None:
        path = self._handles.get(handle) if handle in self._open else None
        if path is None or size:
            raise NotImplementedError("only what is watched is cut, and only to nothing")
        self._do("cut", path, lambda: REAL["os.ftruncate"](handle, 0), Op("cut", path))

    @contextmanager
    def active(self) -> Iterator[Disk]:
        """Watch; afterwards files that a "killed" process had open are closed, and with them its locks."""
        from hf_quant.disk import folders

        def no_sendfile(*_: Any) -> int:
            raise OSError(errno.EINVAL, "copied by read and write, where it is seen")

        fakes: dict[str, Any] = {
            "open": self._fake_os_open, "close": self._fake_os_close, "write": self._fake_os_write,
            "ftruncate": self._fake_ftruncate, "sendfile": no_sendfile, "fsync": self._sync, "fdatasync": self._sync,
            "rename": lambda a, b: self._rename(REAL["os.rename"], a, b),
            "replace": lambda a, b: self._rename(REAL["os.replace"], a, b),
            "link": lambda a, b, **_: self._rename(REAL["os.link"], a, b, "link"),
            "unlink": lambda p, **where: self._remove(REAL["os.unlink"], "unlink", p, **where),
            "remove": lambda p, **where: self._remove(REAL["os.unlink"], "unlink", p, **where),
            "rmdir": lambda p, **where: self._remove(REAL["os.rmdir"], "rmdir", p, **where),
            "mkdir": self._fake_mkdir,
        }  # fmt: skip
        exchange = folders._exchange
        with ExitStack() as stack:
            for name, fake in fakes.items():
                stack.enter_context(mock.patch.object(os, name, fake))
            stack.enter_context(mock.patch.object(builtins, "open", self._fake_open))
            stack.enter_context(mock.patch.object(io, "open", self._fake_open))
            stack.enter_context(
                mock.patch.object(folders, "_exchange", lambda a, b: self._rename(exchange, a, b, "exchange"))
            )
            try:
                yield self
            finally:
                for handle in list(self._open):
                    self._fake_os_close(handle)

    def _fake_mkdir(self, path: Any, mode: int = 0o777, **where: Any) -> None:
        name = self._inside(path)
        if name is None or os.path.lexists(path):
            REAL["os.mkdir"](path, mode, **where)
            return
        self._do("mkdir", name, lambda: REAL["os.mkdir"](path, mode), Op("mkdir", name))
        self._known.add(name)

    def again(self) -> Disk:
        """The same disk for the next process: what the last one wrote and did not sync is still on its way."""
        self.at, self.kind, self._dead, self._full = 0, "", False, False
        self._failed.clear()
        return self


REAL = {
    "open": io.open, "os.open": os.open, "os.close": os.close, "os.write": os.write, "os.ftruncate": os.ftruncate,
    "os.rename": os.rename, "os.replace": os.replace, "os.link": os.link, "os.unlink": os.unlink, "os.rmdir": os.rmdir,
    "os.mkdir": os.mkdir,
}  # fmt: skip


class _Raw(io.FileIO):
    """What a buffer writes to."""

    disk: Disk
    path: str

    def write(self, data: Any) -> int:
        offset = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
        return self.disk._write(self.path, bytes(data), offset, super().write)


# -- losing power -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _File:
    now: bytes = b""
    safe: bytes = b""  # what is on disk for certain
    kept: int = 0  # leading bytes that nobody has touched since
    lost: bytes | None = None  # what the system gave up writing: it is not written unless it is changed


@dataclass(eq=False)
class _Folder:
    now: dict[str, _File | _Folder] = field(default_factory=dict)
    safe: dict[str, _File | _Folder] = field(default_factory=dict)
    waiting: list[_Change] = field(default_factory=list)


Node = _File | _Folder


@dataclass(eq=False)
class _Change:
    """Entries that change together."""

    number: int
    edits: list[tuple[_Folder, str, Node | None]]


def image(root: Path) -> dict[str, bytes | None]:
    """Everything in a folder: files by content, folders as None, in order."""
    return {
        os.path.relpath(path, root): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))
    }


class _Replay:
    """The folder as it was after some operations, and what of it is on disk for certain."""

    def __init__(self, base: dict[str, bytes | None]) -> None:
        self.root = _Folder()
        self.changes = 0
        for name, data in base.items():
            folder, leaf = self._at(name)
            folder.now[leaf] = folder.safe[leaf] = _Folder() if data is None else _File(data, data, len(data))

    def _at(self, path: str) -> tuple[_Folder, str]:
        *folders, leaf = path.split("/")
        folder = self.root
        for name in folders:
            folder = folder.now[name]  # type: ignore[assignment]
        return folder, leaf

    def _get(self, path: str) -> Any:
        if path == ".":
            return self.root
        folder, leaf = self._at(path)
        return folder.now[leaf]

    def _change(self, *edits: tuple[tuple[_Folder, str], Node | None]) -> None:
        change = _Change(self.changes, [(*place, node) for place, node in edits])
        self.changes += 1
        for folder, name, node in change.edits:
            if node is None:
                del folder.now[name]
            else:
                folder.now[name] = node
            if change not in folder.waiting:
                folder.waiting.append(change)

    def apply(self, op: Op) -> None:
        if op.kind in ("make", "mkdir"):
            self._change((self._at(op.path), _File() if op.kind == "make" else _Folder()))
        elif op.kind in ("write", "cut"):
            file = self._get(op.path)
            file.kept = min(file.kept, op.offset)
            file.now = b"" if op.kind == "cut" else _patched(file.now, op)
        elif op.kind in ("unlink", "rmdir"):
            self._change((self._at(op.path), None))
        elif op.kind == "link":
            self._change((self._at(op.other), self._get(op.path)))
        elif op.kind == "rename":
            self._change((self._at(op.path), None), (self._at(op.other), self._get(op.path)))
        elif op.kind == "exchange":
            self._change((self._at(op.path), self._get(op.other)), (self._at(op.other), self._get(op.path)))
        elif op.kind == "lost":
            node = self._get(op.path)
            if isinstance(node, _File):
                node.lost = node.now
        elif op.kind == "sync":
            self._sync(self._get(op.path))

    def _sync(self, node: Node) -> None:
        if isinstance(node, _File):
            node.safe = node.now if node.lost is None else _without(node)
            node.kept = len(node.now)
            return
        for change in list(node.waiting):
            for folder, name, child in change.edits:
                _set(folder.safe, name, child)
                if change in folder.waiting:
                    folder.waiting.remove(change)

    def without_power(self, draw: random.Random) -> dict[str, bytes | None]:
        """What could be found afterwards."""
        waiting = sorted(
            {id(c): c for folder in _folders(self.root) for c in folder.waiting}.values(), key=lambda c: c.number
        )
        how = draw.choice(("none", "first", "first", "all", "some", "some"))
        if how == "first":
            waiting = waiting[: draw.randint(0, len(waiting))]
        elif how != "all":
            waiting = [change for change in waiting if how == "some" and draw.random() < 0.5]
        entries: dict[_Folder, dict[str, Node]] = {}
        for change in waiting:
            for folder, name, node in change.edits:
                _set(entries.setdefault(folder, dict(folder.safe)), name, node)
        found: dict[str, bytes | None] = {}
        contents: dict[_File, bytes] = {}  # a file has the same content under all its names

        def walk(folder: _Folder, path: str) -> None:
            for name, node in entries.get(folder, folder.safe).items():
                if isinstance(node, _Folder):
                    found[path + name] = None
                    walk(node, f"{path}{name}/")
                else:
                    found[path + name] = contents.setdefault(node, _torn(node, draw))

        walk(self.root, "")
        return found


def _set(entries: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def _patched(data: bytes, op: Op) -> bytes:
    data = data.ljust(op.offset, b"\0")
    return data[: op.offset] + op.data + data[op.offset + len(op.data) :]


def _without(file: _File) -> bytes:
    """What a sync writes after one that failed: only what has changed since."""
    old = file.safe.ljust(len(file.now), b"\0")
    return bytes(
        old[i] if i < len(file.lost or b"") and (file.lost or b"")[i] == byte else byte
        for i, byte in enumerate(file.now)
    )


def _torn(file: _File, draw: random.Random) -> bytes:
    """What could be in a file: nothing that was synced and not touched since is in danger."""
    if file.now == file.safe:
        return file.now
    head, tail = file.now[: file.kept], file.now[file.kept :]
    sources = (tail, bytes(len(tail)), file.safe[file.kept :].ljust(len(tail), b"\0"))
    pages = b"".join(draw.choice(sources)[i : i + PAGE] for i in range(0, len(tail), PAGE))
    return draw.choice(
        (file.safe, file.now, head + bytes(len(tail)), head + tail[: len(tail) // 2], head + pages[: len(tail)])
    )


def _folders(folder: _Folder) -> Iterator[_Folder]:
    """All that can be reached, by entries old or new."""
    seen: dict[_Folder, None] = {}
    stack = [folder]
    while stack:
        each = stack.pop()
        if each not in seen:
            seen[each] = None
            changed = [node for change in each.waiting for _, _, node in change.edits]
            stack += [
                node for node in (*each.now.values(), *each.safe.values(), *changed) if isinstance(node, _Folder)
            ]
    return iter(seen)


def states(disk: Disk, draws: int, seed: int = 0) -> Iterator[tuple[int, dict[str, bytes | None]]]:
    """Every moment, and what could be found if the power failed then; the same find is given once for each moment."""
    replay = _Replay(disk.base)
    for moment, op in enumerate(disk.log, 1):
        replay.apply(op)
        seen = set()
        for i in range(draws):
            found = replay.without_power(random.Random(f"{seed} {moment} {i}"))
            key = hash(frozenset(found.items()))
            if key not in seen:
                seen.add(key)
                yield moment, found


def restore(found: dict[str, bytes | None], root: Path) -> None:
    """Make a folder what was found."""
    root.mkdir(parents=True)
    for name, data in found.items():
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
