"""``hf-quant report``: one page about what was measured."""

from __future__ import annotations

from pathlib import Path

import click

from hf_quant.cli._common import emit, output_options
from hf_quant.cli._types import Folder
from hf_quant.errors import HfQuantError


@click.command()
@click.argument("folder", type=Folder())
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Default: report.html in FOLDER; only a report is replaced.",
)
@output_options
def command(folder: Path, output: Path | None, as_json: bool, quiet: bool) -> None:
    """Write one HTML file on FOLDER: numbers, charts and recipe, readable without a network and on a phone."""
    from hf_quant.disk.atomic import write_bytes
    from hf_quant.publish.page import html_page, why_not

    out = output or folder / "report.html"
    if (reason := why_not(out)) is not None:
        raise HfQuantError(f"{out}: {reason}")
    write_bytes(out, html_page(folder).encode())
    emit(as_json, quiet, record={"report": str(out)}, essential=str(out), human=str(out))


COMMAND = command
