"""manifest.json lists the files of a published folder, so that a download can be compared with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from hf_quant.disk.digests import MANIFEST, Digest, mismatches, read_manifest
from hf_quant.errors import CheckpointError
from hf_quant.publish.card import CARD

VERSION = 1


def manifest_of(files: Mapping[str, Digest]) -> bytes:
    """The text of a manifest for ``files``, without the card, which people edit on the Hub."""
    listed = {
        name: {"bytes": digest.bytes, "sha256": digest.sha256}
        for name, digest in sorted(files.items()) if name not in (CARD, MANIFEST)
    }  # fmt: skip
    return (json.dumps({"version": VERSION, "files": listed}, indent=2) + "\n").encode()


def verify_folder(folder: Path) -> int:
    """Check every file of the folder's manifest; returns their number.

    Raises:
        CheckpointError: There is no manifest, weights are missing from it, or a file is missing or differs.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder}: no {MANIFEST}, so there is nothing to check against; hf-quant push writes it"
        )
    expected = read_manifest(folder / MANIFEST)
    if unlisted := sorted({path.name for path in folder.glob("*.safetensors")} - expected.keys()):
        raise CheckpointError(f"{MANIFEST} does not list {unlisted[0]}, so nothing says what it should hold")
    if wrong := mismatches(folder, expected):
        raise CheckpointError("\n".join(wrong))
    return len(expected)


def verify_repo(repo_id: str, revision: str | None = None, token: str | None = None) -> int:
    """Download what is not in the cache, and check every file of the manifest; returns their number.

    Raises:
        CheckpointError: As `verify_folder`.
    """
    try:
        hf_hub_download(repo_id, MANIFEST, revision=revision, token=token)
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id}: is no folder here, and the Hub cannot be reached, nor does its cache hold {MANIFEST}: {error}"
        ) from None
    except EntryNotFoundError:
        raise CheckpointError(f"{repo_id}: no {MANIFEST}; it was not published by hf-quant push") from None
    return verify_folder(Path(snapshot_download(repo_id, revision=revision, token=token)))
