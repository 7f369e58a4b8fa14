"""``hf-quant card``: a model card in which every number was measured."""

from __future__ import annotations

from pathlib import Path

import click

from hf_quant.cli._common import emit, output_options, waiting
from hf_quant.cli._types import Folder
from hf_quant.cli._words import Group
from hf_quant.errors import PushError

FOLDER = click.argument("folder", type=Folder())


@click.group(cls=Group, short_help="Write or check a model card.")
def command() -> None:
    """Write, show or check the model card of a folder."""


@command.command()
@FOLDER
@click.option("--overwrite", is_flag=True, help="Replace a README.md that was written by hand, too.")
@output_options
def build(folder: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Write README.md and its pictures into FOLDER, from recipe.json and results.json."""
    from hf_quant.disk.atomic import write_bytes
    from hf_quant.publish import card

    recipe, results = card.facts(folder)
    if not overwrite and (folder / card.CARD).exists():
        card.check_replaceable((folder / card.CARD).read_bytes())
    with waiting("drawing", quiet or as_json):
        drawn = card.pictures(results)
    (folder / card.ASSETS).mkdir(exist_ok=True)
    for name, data in drawn.items():
        write_bytes(folder / card.ASSETS / name, data)
    path = folder / card.CARD
    write_bytes(path, card.render(recipe, results, drawn).encode())
    emit(as_json, quiet, record={"card": str(path), "pictures": list(drawn)}, essential=str(path), human=str(path))


@command.command()
@FOLDER
@output_options
def show(folder: Path, as_json: bool, quiet: bool) -> None:
    """Print the card that `build` would write."""
    from hf_quant.publish import card

    recipe, results = card.facts(folder)
    with waiting("drawing", quiet or as_json):
        text = card.render(recipe, results, card.pictures(results))
    emit(as_json, quiet, record={"card": text}, essential=text, human=text)


@command.command()
@FOLDER
@output_options
def validate(folder: Path, as_json: bool, quiet: bool) -> None:
    """Check that README.md is what the measured facts give, and that the Hub takes its metadata; needs no Hub."""
    from hf_quant.publish import card

    if wrong := card.problems(folder):
        raise PushError("\n".join(wrong))
    emit(
        as_json,
        quiet,
        record={"card": str(folder / card.CARD), "problems": []},
        essential="ok",
        human="nothing is wrong",
    )


COMMAND = command
