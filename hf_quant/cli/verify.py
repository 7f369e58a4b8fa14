"""``hf-quant verify``: whether a published checkpoint holds what its manifest says."""

from __future__ import annotations

from pathlib import Path

import click

from hf_quant.cli._common import bars, emit, output_options


@click.command()
@click.argument("model")
@click.option("--revision", help="Of a Hub model.")
@output_options
def command(model: str, revision: str | None, as_json: bool, quiet: bool) -> None:
    """Check the sha256 of every file of MODEL, a folder or a Hub id, against its manifest.json."""
    from hf_quant.hub.manifest import verify_folder, verify_repo

    bars(quiet or as_json)
    count = verify_folder(Path(model)) if Path(model).is_dir() else verify_repo(model, revision)
    emit(
        as_json,
        quiet,
        record={"model": model, "files": count},
        essential=str(count),
        human=f"{count} files are as published",
    )


COMMAND = command
