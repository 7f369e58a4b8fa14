"""``hf-quant eval``: what a model lost beside the one it was made from."""

from __future__ import annotations

import sys
from typing import Any

import click

from hf_quant.cli._common import (
    bars,
    chat_options,
    cosine_option,
    emit,
    gate_options,
    measure_options,
    output_options,
    say,
)
from hf_quant.cli._screen import Part
from hf_quant.cli._types import Choice, Device, Model


@click.command(short_help="What a model lost beside its base.")
@click.argument("model", type=Model())
@click.option("--base", type=Model(), help="The model it was made from; default: the one its recipe.json names.")
@click.option("--device", type=Device(), help="Where to run both: cpu, cuda, auto, ...")
@click.option("--kv-cache", type=Choice("int8", "int4"), help="Measure it with keys and values kept like that.")
@click.option("--tasks", help="Tasks of lm-evaluation-harness too, separated by commas.")
@chat_options
@measure_options
@gate_options
@cosine_option
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoints bring along.")
@output_options
def command(model: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure MODEL against the model it was made from: KL divergence, perplexity, top-1 agreement."""
    from hf_quant.jobs.evaluate import evaluate

    done = evaluate(model, progress=bars(quiet or as_json), say=lambda line: say(line, quiet), **options)
    human: list[Part] = [done.grid(), *done.footnotes()]
    emit(as_json, quiet, record=done.to_dict(), essential=f"{done.main.value:.6g}", human=human)
    for line in done.misses():
        say(line)
    if not done.passed:
        sys.exit(3)


COMMAND = command
