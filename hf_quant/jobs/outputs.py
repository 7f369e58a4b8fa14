"""Where a command may write: into a folder of its own, and over nothing but what hf-quant wrote itself.

A folder is recognised as written by hf-quant by a record in it: recipe.json of quantized models, conversion.json of
converted ones. The record lists the files, so that a file that somebody else has added is not lost either.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_quant.disk.folders import clear, staged
from hf_quant.disk.journal import is_journal
from hf_quant.disk.locks import locked
from hf_quant.errors import DiskError, HfQuantError, printable

RECIPE, CONVERSION = "recipe.json", "conversion.json"
RECORDS = (CONVERSION, RECIPE)  # a conversion copies the recipe, so its own record comes first
LARGEST = 1 << 26  # bytes of a record: it names every layer
LONGEST = 255 - len("..before-01234567")  # bytes of a name, so that hidden names made from it fit too
LATER = re.compile(  # what other commands add to a folder, and what file managers leave in one
    r"(recipe|conversion|results|ladder|manifest)\.json|README\.md|report\.html|assets|[\w]+-(light|dark)\.png"
    r"|\.DS_Store|Thumbs\.db|desktop\.ini|\.cache|\.gitattributes"
)


def shown(path: str | os.PathLike[str]) -> str:
    """A path as it can be printed: control characters and bytes that are not UTF-8 are escaped."""
    return printable(os.fspath(path), lines=False)


def check_output(out: Path, inputs: Iterable[str | Path] = (), *, overwrite: bool = False) -> None:
    """Refuse an output folder that would harm something, before any work is done.

    Nothing is changed but that what killed processes have left beside ``out`` is removed.

    Args:
        out: The folder that shall appear.
        inputs: Folders and files that are read; whatever does not exist (a Hub id) is passed over.
        overwrite: Whether ``out`` may be there already; it must be a folder that hf-quant wrote then.

    Raises:
        HfQuantError: ``out`` is an input, holds one or lies in one; is the current folder or holds it; is a file; exists
            and may not be replaced; holds something that hf-quant did not write; or has a name that cannot be used.
    """
    check_name(out)
    real = Path(os.path.realpath(out))
    with suppress(FileNotFoundError):  # of a current folder that was removed
        if any(_same(real, parent) for parent in _upwards(Path.cwd())):
            raise HfQuantError(f"{shown(out)}: is the current folder, or holds it: name a new folder for the result")
    for source in inputs:
        _check_input(out, real, Path(source))
    if real.exists() and not real.is_dir():
        raise HfQuantError(f"{shown(out)}: is a file, and the result is a folder")
    _clear(out, real)
    if not real.is_dir() or not any(real.iterdir()):
        return
    if not overwrite:
        raise HfQuantError(f"{shown(out)}: exists and is not empty; --overwrite (overwrite=True) replaces it")
    if (reason := not_ours(real)) is not None:
        raise HfQuantError(
            f"{shown(out)}: {reason}, and only what hf-quant wrote is replaced: move it away, or name another folder"
        )


def check_places(outs: Sequence[Path], inputs: Sequence[str], *, overwrite: bool, gate: bool) -> None:
    """Refuse ``outs`` if writing one, the folder of a missed gate or that of finished blocks would harm something.

    Args:
        outs: Folders of results.
        inputs: Everything that is read.
        overwrite: Whether a folder that hf-quant wrote may be replaced.
        gate: Whether there is one to be missed.

    Raises:
        HfQuantError: See `check_output`.
    """
    for out in outs:
        check_name(out)
        work = work_folder(out)
        check_output(out, inputs, overwrite=overwrite or is_journal(work))  # its blocks may just have become `out`
        if work.is_symlink():
            raise HfQuantError(f"{shown(work)}: is a link, and finished blocks need a folder of that name: remove it")
        if gate:
            check_output(failed_folder(out), inputs, overwrite=overwrite)


def work_folder(out: Path) -> Path:
    """Where finished blocks stay until ``out`` is there."""
    real = Path(os.path.realpath(out))
    return real.with_name(f"{real.name}.work")


def failed_folder(out: Path) -> Path:
    """Where a model goes that missed its gate."""
    return out.with_name(f"{out.name}-failed")


@contextmanager
def output(out: Path, inputs: Iterable[str | Path] = (), *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` if the body succeeds (`disk.folders.staged`), where `check_output` allows it.

    It is asked again at the end: the folder may have been filled by somebody else in the meantime.
    """
    inputs = tuple(inputs)
    check_output(out, inputs, overwrite=overwrite)
    with staged(out, overwrite=overwrite) as stage:
        check_output(out, inputs, overwrite=overwrite)  # an interrupted exchange may have been undone just now
        yield stage
        check_output(out, inputs, overwrite=overwrite)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keep other processes from writing ``out``.

    Raises:
        HfQuantError: Another one is writing it.
    """
    real = Path(os.path.realpath(out))
    with locked(_lock(real), out):
        yield


def _lock(real: Path) -> Path:
    return real.with_name(f".{real.name}.lock")


def _clear(out: Path, real: Path) -> None:
    """Remove what killed processes have left; somebody who works there now does so, or will."""
    if _lock(real).exists() or any(real.parent.glob(f".{glob.escape(real.name)}.*-*")):
        try:
            with claimed(out):
                clear(real)
        except DiskError:
            raise
        except HfQuantError:
            pass  # the lock is taken, or is no lock: whoever needs it will say so


def record(stage: Path) -> dict[str, Any]:
    """What a record must say for the folder to be recognised: the version that wrote it, and the files there are now."""
    files = sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if not path.is_dir())
    return {"versions": {"hf-quant": version("hf-quant")}, "files": files}


def not_ours(folder: Path) -> str | None:
    """Why a folder is not one that hf-quant wrote, in words; None if it is."""
    listing = next((candidate for name in RECORDS if (candidate := _read(folder / name)) is not None), None)
    if listing is None:
        return f"was not written by hf-quant (it has no {RECIPE})"
    if not isinstance(listed := listing.get("files"), list):
        return None  # written before files were listed
    known = {str(name).replace("\\", "/").split("/")[0] for name in listed}
    files = {str(name).replace("\\", "/") for name in listed}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        top = name.split("/")[0]
        if LATER.fullmatch(top) or name in files or (path.is_dir() and not path.is_symlink() and top in known):
            continue
        return f"holds {shown(name)}, which hf-quant did not write"
    return None


def _read(path: Path) -> Mapping[str, Any] | None:
    """A record of ours; None if there is none."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    versions = content.get("versions") if isinstance(content, dict) else None
    return content if isinstance(versions, dict) and "hf-quant" in versions else None


def check_name(out: Path) -> None:
    """Refuse a path that no result can have.

    Raises:
        HfQuantError: It has no name of its own (``/``, ``.``), one that is too long, or is not valid UTF-8.
    """
    if out.name in ("", ".."):
        raise HfQuantError(f"{shown(out)}: has no name of its own: name a new folder for the result")
    _check_encoding(out)
    if (size := len(os.fsencode(out.name))) > LONGEST:
        raise HfQuantError(f"{shown(out)}: this name has {size} bytes, and {LONGEST} are the most")


def _check_encoding(path: Path) -> None:
    try:
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise HfQuantError(
            f"{shown(path)}: is not valid UTF-8, and safetensors opens no file of such a path: rename it"
        ) from None
    except FileNotFoundError:
        raise HfQuantError(f"{shown(path)}: the current folder was removed: give the whole path") from None


def _check_input(out: Path, real: Path, source: Path) -> None:
    if not source.exists():
        return
    _check_encoding(source)
    place = Path(os.path.realpath(source))
    if _same(place, real):
        raise HfQuantError(
            f"{shown(out)}: is the input {shown(source)} itself, and inputs are never replaced; name another folder with -o"
        )
    links = [path for path in place.iterdir() if path.is_symlink()] if place.is_dir() else []
    for path in (place, *(Path(os.path.realpath(link)) for link in links)):
        if any(_same(above, real) for above in _upwards(path)):
            raise HfQuantError(f"{shown(out)}: holds the input {shown(source)}, and inputs are never replaced")
    if place.is_dir() and any(_same(above, place) for above in _upwards(real)):
        raise HfQuantError(f"{shown(out)}: lies in the input {shown(source)}, and inputs are never changed")


def _upwards(path: Path) -> list[Path]:
    return [path, *path.parents]


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one place, under whatever names: case, mounts."""
    if one == other:
        return True
    with suppress(OSError):
        return one.samefile(other)
    return False
