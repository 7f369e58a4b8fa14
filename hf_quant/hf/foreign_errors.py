"""Turns errors of transformers and the Hub's client about a checkpoint into errors of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_quant.errors import CheckpointError, DiskError, HfQuantError, printable

OWN_WORDS = (HfQuantError, MemoryError, torch.OutOfMemoryError)  # raised unchanged
FILE = "config.json"  # the cause: weights have been checked before transformers reads them


@contextmanager
def explained(model: str) -> Iterator[None]:
    """Raise every error of the body as an `HfQuantError` that names the checkpoint.

    Args:
        model: Folder or Hub id.

    Raises:
        DiskError: For an OSError: a file is missing, or cannot be read or downloaded.
        CheckpointError: For all others: transformers cannot build what config.json says, or the weights do not fit.
    """
    try:
        yield
    except OWN_WORDS:
        raise
    except OSError as error:
        raise DiskError(f"{model}: {printable(str(error), 1000)}") from error
    except Exception as error:
        raise CheckpointError(
            f"{model}: transformers cannot make a model of {FILE} and these weights: {type(error).__name__}: "
            f"{printable(str(error), 1000)}"
        ) from error
