"""``hf-quant verify``: every check of a checkpoint, without loading the model."""

from __future__ import annotations

import click

from hf_quant.cli._common import bars, emit, output_options, say
from hf_quant.cli._types import Model


@click.command(short_help="Every check of a checkpoint.")
@click.argument("model", type=Model())
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@output_options
def command(model: str, revision: str | None, as_json: bool, quiet: bool) -> None:
    """Check MODEL, a folder or a Hub id: the sha256 of every file in its manifest; of a folder also headers, shapes, scales,
    zero points, orders of columns, and that all is finite.

    Whatever is wrong is named, and the exit code is 1. One layer is in memory at a time, and nothing is executed.
    """
    from hf_quant.jobs.verify import verify

    done = verify(model, revision=revision, progress=bars(quiet or as_json), say=lambda line: say(line, quiet))
    emit(as_json, quiet, record=done.to_dict(), essential="sound", human=[done.title(), done.grid()])


COMMAND = command
