"""Checks downloaded weights against the manifest of their repository; the Hub's client checks only their size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import logging

from hf_quant.disk.digests import MANIFEST, mismatches, read_manifest
from hf_quant.errors import CheckpointError, printable
from hf_quant.hf._hooks import download_options

logger = logging.get_logger(__name__)


def check_weights(files: Sequence[Path], *, ours: bool = True) -> None:
    """Check the SHA-256 of ``files`` if there is a manifest; ``HF_QUANT_VERIFY=0`` disables the check.

    The manifest is downloaded with the options of ``from_pretrained``; with ``local_files_only=True`` or ``HF_HUB_OFFLINE=1``, only the
    cache is used.

    Args:
        files: Files of one checkpoint, in a folder or in a snapshot of the Hub's cache.
        ours: Whether this package wrote the checkpoint, so that a manifest can be expected. Only then is it a warning if the Hub
            does not answer.

    Raises:
        CheckpointError: A file differs from the published one.
    """
    if os.environ.get("HF_QUANT_VERIFY") == "0" or not files:  # an index may list no tensors
        return
    folder = files[0].parent
    manifest = folder / MANIFEST if (folder / MANIFEST).is_file() else _pulled(folder, ours)
    if manifest is None:
        return
    listed = read_manifest(manifest)
    if unlisted := [file.name for file in files if file.name not in listed]:
        raise CheckpointError(f"{MANIFEST} does not list {unlisted[0]}, so nothing says what it should hold")
    expected = {file.name: listed[file.name] for file in files}
    if wrong := mismatches(folder, expected):
        raise CheckpointError(
            f"{wrong[0]}. The download is damaged, or the file was changed: get it again with force_download=True, or remove "
            f"{MANIFEST} if the change is yours"
        )


def _pulled(folder: Path, ours: bool) -> Path | None:
    """The manifest of the same commit, if ``folder`` is ``models--owner--name/snapshots/<commit>`` of a cache, or a folder in
    there."""
    snapshot = next((parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"), folder)
    store = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not store.name.startswith("models--"):
        return None
    repo_id = store.name.removeprefix("models--").replace("--", "/", 1)
    name = (folder.relative_to(snapshot) / MANIFEST).as_posix()
    where: dict[str, Any] = {"revision": snapshot.name, "cache_dir": store.parent}
    cached = try_to_load_from_cache(repo_id, name, **where)
    if cached is not None and not isinstance(cached, str):  # the cache remembers that the Hub has no such file
        return None
    options = download_options()
    offline = bool(options.get("local_files_only")) or constants.HF_HUB_OFFLINE
    try:
        return Path(hf_hub_download(repo_id, name, token=options.get("token"), local_files_only=offline, **where))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            logger.debug(f"{repo_id} has no {name}")
            return None
    except Exception:  # the client passes on any error of its transport
        pass
    report = logger.warning if ours and not offline else logger.info
    report(printable(f"{repo_id}: {name} cannot be read now, so its weights were not checked"))
    return None
