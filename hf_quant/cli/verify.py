"""``hf-quant verify``: every check of a checkpoint, without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_quant.cli._common import bars, emit, output_options, table
from hf_quant.cli._types import Model


@click.command()
@click.argument("model", type=Model())
@click.option("--revision", help="Of a Hub model.")
@output_options
def command(model: str, revision: str | None, as_json: bool, quiet: bool) -> None:
    """Check MODEL, a folder or a Hub id: the sha256 of every file in its manifest; of a folder also headers, shapes, scales,
    zero points, orders of columns, and that all is finite.

    Whatever is wrong is named, and the exit code is 1. One layer is in memory at a time, and nothing is executed.
    """
    shown = bars(quiet or as_json)
    record = _folder(Path(model), shown) if Path(model).is_dir() else _repository(model, revision)
    human = table(("field", "value"), [(name, str(value)) for name, value in record.items()])
    emit(as_json, quiet, record=record, essential="sound", human=human)


def _repository(model: str, revision: str | None) -> dict[str, Any]:
    from hf_quant.publish.manifest import verify_repo

    return {"sound": True, "files": verify_repo(model, revision)}


def _folder(folder: Path, shown: bool) -> dict[str, Any]:
    from tqdm import tqdm

    from hf_quant.disk.digests import MANIFEST
    from hf_quant.jobs.verify import verify
    from hf_quant.publish.manifest import verify_folder

    files = verify_folder(folder) if (folder / MANIFEST).is_file() else None
    done = verify(folder, progress=lambda layers: tqdm(layers, desc="layers", disable=not shown))
    return {
        "sound": True, "files": files, "format": done.format, "layers_quantized": done.layers, "tensors": done.tensors,
        "bytes": done.size, "notes": done.notes,
    }  # fmt: skip


COMMAND = command
