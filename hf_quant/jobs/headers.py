"""A checkpoint as far as its headers tell, in a folder or on the Hub: of that, kilobytes are fetched where weights are gigabytes."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_url, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]  # documented all the same
from torch import Tensor

from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.disk.safetensors import TORCH
from hf_quant.disk.strict_json import MAX_BYTES
from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.jobs.progress import their_bars

FIRST = 1 << 17  # bytes of a file that are asked for at once: most headers are shorter
SHARD = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*\.safetensors")


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """Headers that were fetched; a tensor is fetched when it is read.

    Attributes:
        model: Hub id.
        commit: Of the repository.
    """

    model: str = ""
    commit: str = ""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            CheckpointError: There is no tensor of that name, or its dtype is none of torch.
        """
        info = self.tensors.get(name)
        if info is None or info.dtype not in TORCH:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint, or of a type that is not read")
        data = bytearray(_part(self.model, self.commit, info.file.name, info.offset, info.nbytes))
        dtype = TORCH[info.dtype]
        return (
            torch.frombuffer(data, dtype=dtype).reshape(info.shape) if data else torch.empty(info.shape, dtype=dtype)
        )


@contextmanager
def opened(model: str, revision: str | None = None) -> Iterator[Checkpoint]:
    """The checkpoint in a folder, or of a Hub id; what is fetched is removed afterwards, but for what the Hub's cache keeps.

    Raises:
        CheckpointError: A header is damaged.
        HfQuantError: There is no such model, or the Hub is not in reach.
    """
    if Path(model).is_dir():
        yield Checkpoint.open(Path(model))
    elif (cached := _cached(model, revision)) is not None:
        yield cached
    else:
        with TemporaryDirectory(prefix="hf-quant-") as folder:
            try:
                commit = _fetch(model, revision, Path(folder))
            except HfQuantError:
                raise
            except Exception as error:  # of the client and of its transport; they have no common type
                raise HfQuantError(not_there(model, error)) from None
            headers = Checkpoint.open(Path(folder))
            yield RemoteCheckpoint(headers.folder, headers.config, headers.tensors, model=model, commit=commit)


def downloaded(model: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a model; a Hub id is downloaded into the Hub's cache.

    Raises:
        HfQuantError: There is no such model, or the Hub is not in reach.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # as above
        raise HfQuantError(not_there(model, error)) from None


def not_there(model: str, error: Exception) -> str:
    """The message about a Hub id that cannot be had."""
    if isinstance(error, LocalEntryNotFoundError):
        return f"{model}: no such folder, not in the cache, and the Hub is not in reach"
    if isinstance(error, RevisionNotFoundError):
        return f"{model}: has no such revision on the Hub: --revision names a branch, a tag or a commit"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{model}: there is no such folder here, and the Hub gives no model of that name ({first})"


def _cached(model: str, revision: str | None) -> Checkpoint | None:
    """The checkpoint in the Hub's cache, if it is complete there."""
    try:
        return Checkpoint.open(Path(snapshot_download(model, revision=revision, local_files_only=True)))
    except (CheckpointError, OSError):
        return None


def _fetch(model: str, revision: str | None, folder: Path) -> str:
    """Put config files into ``folder``, and weight files that have a header and then a hole; gives the commit."""
    info = HfApi().model_info(model, revision=revision)
    commit = str(info.sha)
    with their_bars(shown=False):  # for a few small files
        snapshot = Path(snapshot_download(model, revision=commit, allow_patterns=["*.json"]))
    for file in snapshot.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    for name in (sibling.rfilename for sibling in info.siblings or []):
        if SHARD.fullmatch(name):
            header, size = _header(model, commit, name)
            with (folder / name).open("wb") as target:
                target.write(header)
                target.truncate(size)
    return commit


def _header(model: str, commit: str, name: str) -> tuple[bytes, int]:
    """The header of a weight file, and the size of the whole file."""
    answer = _asked(model, commit, name, 0, FIRST)
    start, size = answer.content, int(answer.headers.get("Content-Range", "/0").rpartition("/")[2])
    length = 8 + struct.unpack("<Q", start[:8].ljust(8, b"\0"))[0]
    if length > MAX_BYTES + 8:
        raise CheckpointError(f"{name}: header of {length - 8} bytes, the limit is {MAX_BYTES}")
    rest = _part(model, commit, name, len(start), length - len(start)) if length > len(start) else b""
    return (start + rest)[:length], size or len(start)


def _part(model: str, commit: str, name: str, offset: int, count: int) -> bytes:
    """Some bytes of a file on the Hub."""
    if not count:
        return b""
    answer = _asked(model, commit, name, offset, count)
    data: bytes = answer.content
    return data if answer.status_code == 206 else data[offset : offset + count]


def _asked(model: str, commit: str, name: str, offset: int, count: int) -> Any:
    """The Hub's answer to a request for some bytes; one that gives no parts answers with the whole file."""
    headers = build_hf_headers() | {"Range": f"bytes={offset}-{offset + count - 1}"}
    answer: Any = get_session().get(hf_hub_url(model, name, revision=commit), headers=headers, follow_redirects=True)
    answer.raise_for_status()
    return answer
