"""``hf-quant convert``: the same codes in another format."""

from __future__ import annotations

from pathlib import Path

import click

from hf_quant.cli._common import bars, emit, output_options, say, target_options
from hf_quant.cli._types import TARGET, Model
from hf_quant.jobs.outputs import check_output


@click.command(short_help="The same codes in another format.")
@click.argument("model", type=Model(gguf=True))
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option(
    "--to",
    required=True,
    type=TARGET,
    metavar="FORMAT",
    help="native, compressed-tensors, gptq, awq, mlx or gguf; dense: floating point.",
)
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Folder of the result.")
@target_options
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@output_options
def command(
    model: str,
    revision: str | None,
    to: str,
    output: str,
    target: str | None,
    tp: int,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the quantized checkpoint MODEL, a folder, a Hub id or a GGUF file, in another format, with the same codes.

    Every layer is read back from disk and compared before the result appears.
    """
    check_output(Path(output), [model], overwrite=overwrite)  # before torch is imported

    from hf_quant.jobs.convert import convert

    done = convert(
        model,
        output,
        to=to,
        revision=revision,
        target=target,
        tp=tp,
        overwrite=overwrite,
        progress=bars(quiet or as_json),
        say=say,
    )
    for line in done.footnotes():
        say(line, quiet or as_json)
    emit(as_json, quiet, record=done.to_dict(), essential=output, human=[done.title(), done.grid()])


COMMAND = command
