"""``hf-quant repair``: a quantized checkpoint comes closer to its base, with the codes that it has."""

from __future__ import annotations

from typing import Any

import click

from hf_quant.cli._common import bars, chat_options, emit, output_options, say, text_options
from hf_quant.cli._types import Device, Model


@click.command(short_help="Train the scales of a quantized model.")
@click.argument("folder", type=Model())
@click.option("-o", "--output", required=True, help="Folder of the result.")
@click.option("--base", required=True, type=Model(), help="The model that FOLDER was made from, in floating point.")
@text_options("What to train on", "base")
@click.option("--passes", type=click.IntRange(1), help="Times that it is seen. Default: 4, or fewer of a long text.")
@chat_options
@click.option("--device", type=Device(), help="Where to train: cpu, cuda, ...")
@click.option("--revision", help="Branch, tag or commit of a base on the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoints bring along.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@output_options
def command(folder: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Train the scales of the quantized checkpoint in FOLDER (GPTQ, AWQ, compressed-tensors, native) until it says what its
    base says. Its codes stay, and what is worse on text that was held out is not kept."""
    from hf_quant.jobs.repair import repair

    done = repair(folder, output, progress=bars(quiet or as_json), say=lambda line: say(line, quiet), **options)
    emit(as_json, quiet, record=done.to_dict(), essential=output, human=done.table())


COMMAND = command
