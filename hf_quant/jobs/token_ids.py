"""Files that hold something other than text or token ids, where nothing else is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_quant.errors import HfQuantError

if TYPE_CHECKING:
    from hf_quant.data.calibration import Calibration

READERS = {".parquet": "from_parquet", ".arrow": "from_file", ".feather": ""}  # of datasets.Dataset
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def refuse_unreadable(option: str, name: str) -> None:
    """Refuse a table or an archive by the name of the file.

    Args:
        option: That names it.
        name: A file, or something else.

    Raises:
        HfQuantError: It is a table or an archive; says what is read.
    """
    suffix = Path(name).suffix.lower()
    if suffix in READERS and Path(name).is_file():
        reader = f"; datasets.Dataset.{READERS[suffix]}({name!r}).to_json('data.jsonl') writes JSONL of it"
        raise HfQuantError(
            f'{option} {name}: is a table, and what is read is UTF-8 text, JSONL with "text" or "messages" in each line, or a '
            f"datasets set by its name{reader if READERS[suffix] else ''}"
        )
    if suffix in PACKED and Path(name).is_file():
        raise HfQuantError(f"{option} {name}: is packed: unpack it first, into UTF-8 text or JSONL")


def refuse_inputs(option: str, what: str, data: Calibration) -> None:
    """Refuse inputs of a model where only text or token ids are looked at.

    Args:
        option: That names them, with its value.
        what: What is on text or token ids alone, as the message says it.
        data: What was read.

    Raises:
        HfQuantError: They are inputs; names the tensors.
    """
    if data.batches:
        names = sorted(data.batches[0])
        others = [name for name in names if name != "input_ids"]
        holds = f"{', '.join(others)} beside input_ids" if len(others) < len(names) else ", ".join(names)
        raise HfQuantError(
            f"{option}: {what} text or token ids, and {data.name} holds {holds}: a safetensors file of token ids holds one tensor and "
            "nothing else, whole numbers [S, T] without padding"
        )
