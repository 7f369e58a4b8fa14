"""Options and output that commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click

from hf_quant.cli._screen import Part, show
from hf_quant.cli._types import (
    SAVED,
    Bits,
    Choice,
    Limit,
    Method,
    Named,
    Override,
    Scheme,
    Share,
    Size,
    TemplateArguments,
)
from hf_quant.errors import printable
from hf_quant.jobs.engine_rules import ENGINE_NAMES
from hf_quant.jobs.options import DTYPES
from hf_quant.jobs.progress import Important, ticking
from hf_quant.jobs.results import Grid
from hf_quant.publish.markdown import shell_word

Function = Callable[..., Any]


def _merged(_ctx: click.Context, _param: click.Parameter, parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """All parts together; None where none was given."""
    names = [name for part in parts for name in part]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise click.BadParameter(f"{twice} is given twice")
    return {name: value for part in parts for name, value in part.items()} if parts else None


chat_options = click.option(
    "--chat-template-kwargs", multiple=True, metavar="KEY=VALUE", type=TemplateArguments(), callback=_merged,
    help="Argument of the chat template that renders messages, such as enable_thinking=false; or all of them as a JSON object.",
)  # fmt: skip


def output_options(function: Function) -> Function:
    """``--json`` and ``-q``, as in ``hf``."""
    function = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(function)
    return click.option("-q", "--quiet", is_flag=True, help="Only the essential value on stdout.")(function)


def _as_dict(_ctx: click.Context, _param: click.Parameter, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs)


def scheme_options(function: Function) -> Function:
    """Everything that makes an `HfQuantConfig`."""
    for option in (
        click.option("--embeddings", is_flag=True, help="Quantize the input embeddings too."),
        click.option("--lm-head", is_flag=True, help="Quantize the output head too."),
        click.option("--override", multiple=True, metavar="GLOB=SCHEME", type=Override(), callback=_as_dict,
                     help="Another scheme for some layers; float leaves them in floating point."),
        click.option("--ignore", multiple=True, metavar="GLOB", help="Layers to leave in floating point."),
        click.option("--format", type=SAVED, metavar="NAME", default="auto",
                     show_default=True, help="auto, native or compressed-tensors."),
        click.option("--method", type=Method(), default="rtn", show_default=True, help="How codes are chosen: rtn, hqq, gptq, awq, calibrated or learned."),
        click.option("--asym/--sym", default=None, help="With zero points or not. Default: with them at 2 and 3 bits."),
        click.option("--group-size", type=int, help="Columns that share a scale; -1: a whole row. Default: 128."),
        click.option("--bits", type=Bits(), help="Width of a code. Default: 4."),
        click.option("--scheme", multiple=True, metavar="SLUG", type=Scheme(),
                     help="For example W4A16-g128; in place of --bits, --group-size and --asym or --sym. quantize and plan take several."),
    ):  # fmt: skip
        function = option(function)
    return function


def target_options(function: Function) -> Function:
    """Which engine shall run the result."""
    for option in (
        click.option("--tp", default=1, show_default=True, help="GPUs that the engine splits each layer over."),
        click.option("--target", type=Choice(*ENGINE_NAMES), help="Say how this engine runs it, or why it cannot."),
    ):
        function = option(function)
    return function


def model_options(function: Function) -> Function:
    """Where a model comes from, and whether its code may run."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings along."),
        click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
    ):
        function = option(function)
    return function


def gate_options(function: Function) -> Function:
    """What quantization may cost; a miss exits with 3."""
    for option in (
        click.option("--min-top1", type=Share(most=1), help="Gate: top-1 agreement with the base, such as 95%."),
        click.option("--max-ppl-increase", type=Share(), help="Gate: perplexity over the base's, such as 1%."),
        click.option("--max-kl", type=Limit(), help="Gate: KL divergence to the base, nats per token, such as 0.02."),
    ):
        function = option(function)
    return function


cosine_option = click.option(
    "--min-cosine",
    type=Share(most=1),
    help="Gate of encoders: cosine similarity of embeddings to the base's, such as 99%.",
)


def measure_options(function: Function) -> Function:
    """What to measure on, and how."""
    for option in (
        click.option("--allow-overlap", is_flag=True, help="Measure even on text that was calibrated or trained on."),
        click.option("--base-dtype", type=Named({name: full for name, full in DTYPES.items() if name != "auto"}), default="float32",
                     show_default=True, help="What the base computes in while it is the yardstick."),
        click.option("--max-tokens", type=click.IntRange(1), help="Measure about that many at most."),
        click.option("--stride", type=click.IntRange(1), help="Tokens from one window to the next; default: the context."),
        click.option("--context", type=click.IntRange(2), help="Tokens in a window; default: 512, or what the model allows."),
        click.option("--inputs", metavar="FILE", help="Safetensors file with the model's inputs by name (pixel_values, input_features, "
                     "input_ids, ...) to measure on, in place of --text."),
        click.option("--dataset", help="ID[:CONFIG][@SPLIT][#COLUMN] of a datasets set, in place of --text."),
        click.option("--text", help="UTF-8 or JSONL file to measure on; default: heldout.txt beside the model or its base, else a bundled one."),
    ):  # fmt: skip
        function = option(function)
    return function


def text_options(what: str, beside: str = "model", *, inputs: bool = False) -> Callable[[Function], Function]:
    """Which text a command looks at, and how much of it: ``what`` for, whose folder may bring one along, and whether the model's
    inputs will do, too."""
    tensors = " or with the model's inputs by name (pixel_values, input_features, ...)," if inputs else ","

    def decorated(function: Function) -> Function:
        function = click.option(
            "--calibration-tokens", type=click.IntRange(1), default=65536, show_default=True, help="How much of it."
        )(function)
        return click.option(
            "--calibration",
            metavar="TEXT",
            help=f"{what}: a UTF-8 or JSONL file, a safetensors file with token ids{tensors} or "
            "ID[:CONFIG][@SPLIT][#COLUMN][~REVISION] of a datasets set; "
            f"default: calibration.txt beside the {beside}, else a bundled text.",
        )(function)

    return decorated


def calibration_options(function: Function) -> Function:
    """What calibrated methods look at, and what that may take."""
    for option in (
        click.option(
            "--max-memory", type=Size(), help="What activations may take before they go to disk, such as 2GB."
        ),
        click.option(
            "--epochs",
            type=click.IntRange(1),
            help="How often --method learned goes through the calibration text for each block. Default: 6.",
        ),
        text_options("For calibrated methods", inputs=True),
    ):
        function = option(function)
    return function


def say(message: str, quiet: bool = False) -> None:
    """To stderr, unless quiet; each line is short and printable."""
    if not quiet or isinstance(message, Important):
        click.echo("\n".join(map(printable, message.split("\n"))), err=True)


def emit(as_json: bool, quiet: bool, *, record: dict[str, Any], essential: str, human: Part | Sequence[Part]) -> None:
    """The result, in the one form that was asked for. Only what a script reads from a pipe, ``essential``, stays as it is."""
    if as_json:
        click.echo(json.dumps(record))
    elif quiet and not sys.stdout.isatty():
        click.echo(essential)
    elif quiet:
        click.echo(printable(essential, sys.maxsize))
    else:
        show([human] if isinstance(human, str | Grid) else human)


def say_next(folder: Path | None, *, measured: bool, passed: bool, quiet: bool) -> None:
    """Where the result is, and what to do with it."""
    if folder is None or quiet:
        return
    name = shell_word(folder)
    if not passed:
        say(f"in {folder}, since it missed its budget; hf-quant ladder mixes bits until a model is inside it")
    elif measured:
        say(f"in {folder}; next: hf-quant report {name}, or hf-quant push {name} OWNER/NAME")
    else:
        say(f"in {folder}; next: hf-quant eval {name} says what it lost")


def waiting(what: str, quiet: bool) -> AbstractContextManager[None]:
    """Show ``what`` is being done, and for how long, if it takes more than two seconds."""
    return ticking(what) if bars(quiet) else nullcontext()


def bars(quiet: bool) -> bool:
    """Whether to show progress bars."""
    return not quiet and sys.stderr.isatty() and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") != "1"
