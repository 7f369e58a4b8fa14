"""``hf-quant push``: a folder becomes a repository on the Hub, if what was measured allows it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._common import bars, cosine_option, emit, gate_options, output_options, say
from hf_quant.cli._types import Choice, Folder, RepoId

if TYPE_CHECKING:
    from hf_quant.jobs.push import PushResult


@click.command(short_help="Publish a measured model on the Hub.")
@click.argument("folder", type=Folder())
@click.argument("repo_id", type=RepoId())
@click.option("--private/--public", default=None, help="Default: a new one private, an old one as it is.")
@click.option("--gated", type=Choice("inherit", "auto", "manual", "off"), default="inherit", show_default=True,
              help="Whether readers have to ask.")  # fmt: skip
@click.option("--create-pr", is_flag=True, help="As a pull request.")
@click.option("--revision", help="Branch, or refs/pr/N.")
@click.option("--tag", help="Put on the commit.")
@click.option("--base-model", help="Hub id of the base, where the model was made from a folder.")
@click.option("--license", help="Licence of the base, where its card names none.")
@click.option("--allow-failed-gate", is_flag=True, help="Publish all the same; the card begins with it.")
@gate_options
@cosine_option
@click.option("--dry-run", is_flag=True, help="Check, say what would go, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_options
def command(folder: Path, repo_id: str, dry_run: bool, yes: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Publish FOLDER as REPO_ID: with a card of what was measured, and only if that is inside its budget."""
    from hf_quant.jobs.push import push

    if not (yes or dry_run or sys.stdin.isatty()):
        raise click.UsageError("nobody is there to ask: say --yes")

    def confirmed(planned: PushResult) -> bool:
        say(repr(planned), quiet or as_json)
        return yes or click.confirm("Upload?", abort=True, err=True)

    done = push(
        folder, repo_id, dry_run=dry_run, confirm=confirmed, progress=bars(quiet or as_json),
        say=lambda line: say(line, quiet), **options,
    )  # fmt: skip
    human = repr(done) if dry_run else done.title()
    emit(as_json, quiet, record=done.to_dict(), essential=done.url or repo_id, human=human)


COMMAND = command
