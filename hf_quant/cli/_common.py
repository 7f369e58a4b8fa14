"""Options and output that commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.errors import HfQuantError

if TYPE_CHECKING:
    from hf_quant.hf import HfQuantConfig

Function = Callable[..., Any]
TEXT = "heldout.txt"  # the text a model's folder may bring along


def output_options(function: Function) -> Function:
    """``--json`` and ``-q``, as in ``hf``."""
    function = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(function)
    return click.option("-q", "--quiet", is_flag=True, help="Only the essential value on stdout.")(function)


def scheme_options(function: Function) -> Function:
    """Everything that makes an `HfQuantConfig`."""
    for option in (
        click.option("--embeddings", is_flag=True, help="Quantize the input embeddings too."),
        click.option("--lm-head", is_flag=True, help="Quantize the output head too."),
        click.option("--override", multiple=True, metavar="GLOB=SCHEME", help="Another scheme for some layers."),
        click.option("--ignore", multiple=True, metavar="GLOB", help="Layers to leave in floating point."),
        click.option("--format", "fmt", default="auto", help="auto, native or compressed_tensors."),
        click.option("--method", default="rtn", help="How codes are chosen."),
        click.option("--asym", is_flag=True, help="With zero points."),
        click.option("--group-size", type=int, default=128, help="Columns that share a scale; -1: a whole row."),
        click.option("--bits", type=int, default=4, help="8, 4, 3 or 2."),
        click.option("--scheme", multiple=True, metavar="SLUG", help="For example W4A16-g128; in place of the above."),
    ):
        function = option(function)
    return function


def configs(
    scheme: Sequence[str], bits: int, group_size: int, asym: bool, method: str, fmt: str,
    ignore: Sequence[str], override: Sequence[str], lm_head: bool, embeddings: bool,
) -> list[HfQuantConfig]:  # fmt: skip
    """One configuration for every scheme asked for."""
    from hf_quant.hf import HfQuantConfig
    from hf_quant.scheme import QuantScheme

    overrides: dict[str, str | None] = {}
    for item in override:
        glob, equals, slug = item.partition("=")
        if not equals:
            raise click.BadParameter(f"{item!r} is not GLOB=SCHEME", param_hint="--override")
        overrides[glob] = None if slug == "float" else slug
    return [
        HfQuantConfig(
            slug,
            method=method,
            format=fmt,
            overrides=overrides,
            modules_to_not_convert=list(ignore),
            quantize_lm_head=lm_head,
            quantize_embeddings=embeddings,
        )
        for slug in scheme or (str(QuantScheme(bits, group_size, not asym)),)
    ]


def say(message: str, quiet: bool = False) -> None:
    """To stderr, unless quiet."""
    if not quiet:
        click.echo(message, err=True)


def emit(as_json: bool, quiet: bool, *, record: dict[str, Any], essential: str, human: str) -> None:
    """The result, in the one form that was asked for."""
    click.echo(json.dumps(record) if as_json else essential if quiet else human)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, numbers to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def bars(quiet: bool) -> bool:
    """Whether to show progress bars; switches those of transformers off with ours."""
    from transformers.utils import logging

    shown = not quiet and sys.stderr.isatty() and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") != "1"
    if not shown:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return shown


def find_text(text: str | None, *folders: str) -> Path | None:
    """The file asked for, else the held-out text in one of the folders."""
    if text is not None:
        if not Path(text).is_file():
            raise HfQuantError(f"{text}: no such file")
        return Path(text)
    return next((path for folder in folders if (path := Path(folder) / TEXT).is_file()), None)
