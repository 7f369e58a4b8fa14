"""``hf-quant quantize``: a model becomes a smaller one in a folder, and the table says what it cost."""

from __future__ import annotations

import sys
from typing import Any

import click

from hf_quant.cli._common import (
    bars,
    calibration_options,
    chat_options,
    cosine_option,
    emit,
    gate_options,
    measure_options,
    model_options,
    output_options,
    say,
    say_next,
    scheme_options,
)
from hf_quant.cli._screen import Part
from hf_quant.cli._types import DTYPE, Device, Model, Size


@click.command(short_help="A model becomes a smaller one.")
@click.argument("model", type=Model())
@click.option(
    "-o", "--output", required=True, metavar="FOLDER", help="Folder of the result; of several schemes, their parent."
)
@scheme_options
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="What the model computes in.")
@click.option("--device", type=Device(), help="Where to quantize: cpu, cuda, auto, ...")
@model_options
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest file of weights.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@click.option(
    "--eval/--no-eval",
    default=None,
    help="Measure the result; default: if there is a gate, --text, --inputs, or heldout.txt beside the model.",
)
@calibration_options
@click.option(
    "--tune/--no-tune",
    default=True,
    show_default=True,
    help="After --method learned, train the scales end to end; the whole base has to fit into memory for that.",
)
@measure_options
@gate_options
@cosine_option
@chat_options
@click.option("--prompt", help="Let the saved model continue this; with --chat-template-kwargs, answer it.")
@output_options
def command(model: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Quantize MODEL, a folder or a Hub id."""
    from hf_quant.jobs.quantize import quantize
    from hf_quant.jobs.texts import measured_on

    done = quantize(model, output, progress=bars(quiet or as_json), say=lambda line: say(line, quiet), **options)
    if not done.results:  # another process shows the result
        return
    human: list[Part] = [done.grid()]
    if done.results[0].quality is not None and done.text is not None:
        human += ["", measured_on(done.results[0].quality, done.text)]
    if done.generated:
        human += ["", f"{done.folder} continues:", done.generated]
    essential = "\n".join(str(result.folder) for result in done.results)
    emit(as_json, quiet, record=done.to_dict(), essential=essential, human=human)
    for result in done.results:
        for line in result.footnotes():
            say(line)
        measured = result.quality is not None
        say_next(result.folder, measured=measured, passed=result.passed, quiet=quiet or as_json)
    if not done.passed:
        sys.exit(3)


COMMAND = command
