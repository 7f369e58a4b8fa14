"""``hf-quant train``: the weights of a model learn to be rounded, and the result is an ordinary quantized model."""

from __future__ import annotations

import sys
from typing import Any

import click

from hf_quant.cli._common import (
    bars,
    chat_options,
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
from hf_quant.cli._types import DTYPE, Device, Limit, Model, Size


@click.command(short_help="Training with rounded weights.")
@click.argument("model", type=Model())
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Folder of the result.")
@click.option(
    "--data",
    required=True,
    metavar="TEXT",
    help="What to train on: a UTF-8 or JSONL file, a safetensors file with token ids, or "
    "ID[:CONFIG][@SPLIT][#COLUMN][~REVISION] of a datasets set.",
)
@click.option(
    "--teacher",
    metavar="MODEL",
    help="Whose distributions of tokens are learned; default: those of MODEL itself. none: the text is learned.",
)
@click.option("--steps", type=click.IntRange(1), help="Updates of the weights; default: one epoch.")
@click.option("--epochs", type=float, help="Times that the text is seen, in place of --steps.")
@click.option(
    "--lr",
    type=float,
    help="Learning rate of AdamW; default: a fifth of the mean distance between two codes, over the square root of the steps.",
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Windows of text in an update.")
@click.option(
    "--train-context", type=click.IntRange(2), help="Tokens in a window of it; default: 512, or what the model allows."
)
@click.option(
    "--hidden-weight",
    type=Limit(),
    default=0.0,
    show_default=True,
    help="Weight of the relative error of hidden states, beside the divergence from the teacher's distributions.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order of the windows.")
@click.option(
    "--checkpoint-minutes",
    type=Limit(),
    default=5.0,
    show_default=True,
    help="From one checkpoint to the next; the same command goes on from the last.",
)
@click.option(
    "--learn",
    type=click.Choice(["weights", "all"]),
    default="weights",
    show_default=True,
    help="weights: those that are rounded, and their scales. all: embeddings, norms and biases too.",
)
@click.option(
    "--float32",
    is_flag=True,
    help="Train in float32, slower and more exactly; the result is in --dtype all the same.",
)
@click.option(
    "--start",
    type=Model(),
    metavar="MODEL",
    help="Quantized checkpoint that training begins from, in place of --method: its codes, and everything that is not rounded.",
)
@scheme_options
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="What the model computes in.")
@click.option("--device", type=Device(), help="Where to train: cpu, cuda, ...")
@model_options
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest file of weights.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@chat_options
@measure_options
@gate_options
@output_options
def command(model: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Train MODEL, a folder or a Hub id, with its weights rounded to a scheme.

    --method names how the codes are chosen that training begins from; --start names a quantized model that has them already.
    """
    from hf_quant.jobs.texts import measured_on
    from hf_quant.jobs.train import train

    done = train(model, output, progress=bars(quiet or as_json), say=lambda line: say(line, quiet), **options)
    trained = done.results[0]
    human: list[Part] = [done.grid()]
    if trained.quality is not None and done.text is not None:
        human += ["", measured_on(trained.quality, done.text)]
    emit(as_json, quiet, record=done.to_dict(), essential=str(trained.folder), human=human)
    for line in trained.footnotes():
        say(line)
    say_next(trained.folder, measured=trained.quality is not None, passed=trained.passed, quiet=quiet or as_json)
    if not done.passed:
        sys.exit(3)


COMMAND = command
