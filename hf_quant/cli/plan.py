"""``hf-quant plan``: what quantizing would give, from config and headers alone."""

from __future__ import annotations

from typing import Any

import click

from hf_quant.cli._common import emit, model_options, output_options, scheme_options, target_options, waiting
from hf_quant.cli._screen import Part
from hf_quant.cli._types import Model


@click.command(short_help="What quantizing would give.")
@click.argument("model", type=Model())
@scheme_options
@model_options
@target_options
@output_options
def command(model: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Say what quantizing MODEL would give, without reading its weights."""
    from hf_quant.jobs.plan import plan

    with waiting("reading headers", quiet or as_json):
        done = plan(model, **options)
    human: list[Part] = [done.grid(), "", *done.footnotes()]
    essential = f"{done.plans[0].bytes_after / 1e6:.1f}"
    emit(as_json, quiet, record=done.to_dict(), essential=essential, human=human)


COMMAND = command
