"""Paths in a folder from an untrusted source: regular files only, and none outside of the folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hf_quant.errors import CheckpointError


def size_of_regular_file(path: Path, name: str) -> int:
    """Size of a regular file. Called before opening, since opening a FIFO would block."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{name}: not a regular file")
    return status.st_size


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, which must stay in the folder or be a link of the Hugging Face cache.

    There ``snapshots/<revision>/<name>`` points to ``blobs/<hash>`` beside ``snapshots``, and since huggingface_hub 2.4 that may
    point on to ``blobs/<two digits>/<hash>`` of the whole cache.
    """
    path = folder / name
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    repos = [above.parent for above in home.parents if above.name == "snapshots"]
    blobs = {repo / "blobs" for repo in repos} | {repo.parent / "blobs" / target.name[:2] for repo in repos}
    if not target.is_relative_to(home) and target.parent not in blobs:
        raise CheckpointError(f"{name}: points outside the checkpoint folder")
    return path
