"""``hf-quant verify``: every check of a checkpoint, without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_quant.cli._common import bars, emit, output_options, table


@click.command()
@click.argument("folder")
@output_options
def command(folder: str, as_json: bool, quiet: bool) -> None:
    """Check the checkpoint in FOLDER: files, headers, shapes, scales, zero points, orders of columns, and that all is finite.

    Whatever is wrong is named, and the exit code is 1. One layer is in memory at a time, and nothing is executed.
    """
    from tqdm import tqdm

    from hf_quant.hf.verify import verify

    shown = bars(quiet or as_json)
    done = verify(Path(folder), progress=lambda layers: tqdm(layers, desc="layers", disable=not shown))
    record: dict[str, Any] = {
        "sound": True, "format": done.format, "layers_quantized": done.layers, "tensors": done.tensors,
        "bytes": done.size, "notes": done.notes,
    }  # fmt: skip
    human = table(("field", "value"), [(name, str(value)) for name, value in record.items()])
    emit(as_json, quiet, record=record, essential="sound", human=human)


COMMAND = command
