"""``hf-quant report``: one page about what was measured, of one model or of two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_quant.cli._common import chat_options, emit, output_options, waiting
from hf_quant.cli._types import Folder, Model
from hf_quant.errors import HfQuantError, OptionError


@click.command(short_help="A page on one model, or on two.")
@click.argument("folder", type=Folder())
@click.argument("other", type=Folder(), required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Default: report.html in FOLDER; only a report is replaced.",
)
@click.option("--samples", is_flag=True, help="Let FOLDER and its base continue a few texts, and show both.")
@click.option("--prompt", multiple=True, help="A text to continue, in place of those; may be given several times.")
@chat_options
@click.option("--base", type=Model(), help="The model FOLDER was made from; default: the one its recipe.json names.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoints bring along.")
@output_options
def command(
    folder: Path, other: Path | None, output: Path | None, samples: bool, prompt: tuple[str, ...], base: str | None,
    chat_template_kwargs: dict[str, Any] | None, trust_remote_code: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write one HTML file on FOLDER, or on FOLDER beside OTHER.

    Numbers, charts, layers and recipe, readable without a network and on a phone.
    """
    from hf_quant.disk.atomic import write_bytes
    from hf_quant.publish.page import html_page, why_not
    from hf_quant.publish.page_model import Model as Measured

    out = output or folder / "report.html"
    if (reason := why_not(out)) is not None:
        raise HfQuantError(f"{out}: {reason}")
    for measured in filter(None, (folder, other)):
        Measured.of(measured)
    if not out.parent.is_dir():
        raise HfQuantError(f"{out}: there is no folder {out.parent}")
    if not (samples or prompt):
        _refuse_unused(chat_template_kwargs, base, trust_remote_code)
    texts = []
    if samples or prompt:
        from hf_quant.jobs.samples import PROMPTS
        from hf_quant.jobs.samples import samples as continued

        with waiting("base and model continue texts", quiet or as_json):
            texts = continued(
                folder, base, prompt or PROMPTS, chat_template_kwargs=chat_template_kwargs,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
    write_bytes(out, html_page(folder, other, texts).encode())
    emit(as_json, quiet, record={"report": str(out)}, essential=str(out), human=f"{out}: open it in a browser")


def _refuse_unused(arguments: dict[str, Any] | None, base: str | None, trust_remote_code: bool) -> None:
    """Refuse options about the texts that models continue, where none are."""
    if arguments is not None:
        raise OptionError("--chat-template-kwargs: nothing here applies a chat template; --samples and --prompt do")
    for option, is_given in (("--base", base is not None), ("--trust-remote-code", trust_remote_code)):
        if is_given:
            raise OptionError(f"{option}: nothing here runs a model; --samples and --prompt do")


COMMAND = command
