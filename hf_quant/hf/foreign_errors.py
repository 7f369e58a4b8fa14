"""What transformers and the Hub's client raise over a stranger's files, as errors of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_quant.errors import CheckpointError, DiskError, HfQuantError, printable

OWN_WORDS = (HfQuantError, MemoryError, torch.OutOfMemoryError)  # these say themselves what is wrong
FILE = "config.json"  # what transformers reads besides weights, which are checked before it sees them


@contextmanager
def explained(model: str) -> Iterator[None]:
    """Raise whatever transformers raises as an `HfQuantError` that names the checkpoint.

    Args:
        model: Folder or Hub id.

    Raises:
        DiskError: For an OSError: a file is not there, or cannot be read or downloaded.
        CheckpointError: For anything else: config.json says what transformers cannot build, or the weights do not fit.
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
