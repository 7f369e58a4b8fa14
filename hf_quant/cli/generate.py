"""``hf-quant generate``: a model writes more text to calibrate on."""

from __future__ import annotations

from typing import Any

import click

from hf_quant.cli._common import bars, chat_options, emit, output_options, say, text_options
from hf_quant.cli._types import DTYPE, Device, Model


@click.command(short_help="Let a model write text to calibrate on.")
@click.argument("model", type=Model())
@click.option("-o", "--output", required=True, help="The safetensors file of the result, of token ids.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=262144,
    show_default=True,
    help="How much the model writes, rounded up to whole windows.",
)
@text_options("What it goes on from")
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens that a window begins with."
)
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Temperature of the distribution that tokens are drawn from.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=32, show_default=True, help="Windows that are written together."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random numbers.")
@chat_options
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="What the model computes in.")
@click.option("--device", type=Device(), help="Where: cpu, cuda, ...")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings along.")
@output_options
def command(model: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Let MODEL go on from places in a text, and write that text and what it wrote into a file of token ids: more to calibrate on
    where there is little text. --calibration of quantize, ladder and repair takes the file, and so does --data of train."""
    from hf_quant.jobs.generate import generate

    done = generate(model, output, progress=bars(quiet or as_json), say=lambda line: say(line, quiet), **options)
    emit(as_json, quiet, record=done.to_dict(), essential=output, human=done.table())


COMMAND = command
