"""Weights that were pulled are held against the manifest of their repository; the client itself checks only their size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import logging

from hf_quant.digests import MANIFEST, mismatches, read_manifest
from hf_quant.errors import CheckpointError

logger = logging.get_logger(__name__)


def check_weights(files: Sequence[Path]) -> None:
    """Check the sha256 of ``files`` where there is a manifest; ``HF_QUANT_VERIFY=0`` leaves it out.

    Args:
        files: Of one checkpoint, as named: in a folder, or in a snapshot of the Hub's cache.

    Raises:
        CheckpointError: One holds something else than was published.
    """
    if os.environ.get("HF_QUANT_VERIFY") == "0" or not files:  # an index may list no tensors
        return
    folder = files[0].parent
    manifest = folder / MANIFEST if (folder / MANIFEST).is_file() else _pulled(folder)
    if manifest is None:
        return
    listed = read_manifest(manifest)
    expected = {file.name: listed[file.name] for file in files if file.name in listed}
    if wrong := mismatches(folder, expected):
        raise CheckpointError(
            f"{wrong[0]}. The download is damaged, or the file was changed: get it again with force_download=True, or remove "
            f"{MANIFEST} if the change is yours"
        )


def _pulled(folder: Path) -> Path | None:
    """The manifest of the same commit, where ``folder`` is ``models--owner--name/snapshots/<commit>`` of a cache."""
    store = folder.parent.parent
    if folder.parent.name != "snapshots" or not store.name.startswith("models--"):
        return None
    repo_id = store.name.removeprefix("models--").replace("--", "/", 1)
    if try_to_load_from_cache(repo_id, MANIFEST, cache_dir=store.parent, revision=folder.name) is _CACHED_NO_EXIST:
        return None
    try:
        return Path(hf_hub_download(repo_id, MANIFEST, revision=folder.name, cache_dir=store.parent))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            logger.debug(f"{repo_id} has no {MANIFEST}")
            return None
    except Exception:  # the client lets through whatever its transport raises
        pass
    logger.warning(f"{repo_id}: {MANIFEST} cannot be read now, so its weights were not checked")
    return None
