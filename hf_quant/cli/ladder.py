"""``hf-quant ladder``: the smallest model inside a quality budget, or the best one inside a size."""

from __future__ import annotations

import sys
from typing import Any

import click

from hf_quant.cli._common import (
    bars,
    calibration_options,
    chat_options,
    emit,
    gate_options,
    measure_options,
    model_options,
    output_options,
    say,
    say_next,
)
from hf_quant.cli._screen import Part
from hf_quant.cli._types import DTYPE, Device, Method, Model, Size


@click.command(short_help="The smallest model inside a budget.")
@click.argument("model", type=Model())
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Folder of the chosen model.")
@click.option("--max-size", type=Size(), help="Bytes of all weights, such as 4GB; alone: the best model inside it.")
@gate_options
@click.option("--group-size", type=int, default=128, show_default=True, help="Columns that share a scale.")
@click.option("--asym/--sym", default=None, help="With zero points or not. Default: with them at 2 and 3 bits.")
@click.option(
    "--int8-activations", is_flag=True, help="W8A8 and W4A8 on the way down, for speed in prefill and batches."
)
@click.option(
    "--method",
    type=Method(),
    help="How codes are chosen; default: calibrated where there is a text for that (--calibration, or calibration.txt beside "
    "the model), else rtn.",
)
@click.option("--ignore", multiple=True, metavar="GLOB", help="Layers to leave in floating point.")
@click.option("--lm-head", is_flag=True, help="Quantize the output head too.")
@click.option("--embeddings", is_flag=True, help="Quantize the input embeddings too.")
@calibration_options
@chat_options
@measure_options
@click.option("--trial-text", help="UTF-8 or JSONL file for sensitivities; default: calibration.txt beside the model.")
@click.option("--trial-tokens", type=click.IntRange(1), default=4096, show_default=True, help="How much of it.")
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="What the models compute in.")
@click.option("--device", type=Device(), help="Where to run: cpu, cuda, auto, ...")
@model_options
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest file of weights.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@output_options
def command(model: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Walk MODEL down the precision ladder and keep the smallest one inside the budget."""
    from hf_quant.jobs.ladder import ladder

    done = ladder(model, output, progress=bars(quiet or as_json), say=lambda line: say(line, quiet), **options)
    human: list[Part] = [done.grid(), "", *done.footnotes()]
    emit(as_json, quiet, record=done.to_dict(), essential=str(done.folder or ""), human=human)
    say_next(done.folder, measured=True, passed=done.passed, quiet=quiet or as_json)
    if not done.passed:
        for line in done.misses():
            say(line)
        sys.exit(3)


COMMAND = command
