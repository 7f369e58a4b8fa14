"""``hf-quant push``: a folder becomes a repository on the Hub, if what was measured allows it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._common import bars, budget, emit, gate_options, output_options, say
from hf_quant.errors import printable

if TYPE_CHECKING:
    from hf_quant.publish.push import Gated, Publication


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo_id")
@click.option("--private/--public", default=None, help="Default: a new one private, an old one as it is.")
@click.option("--gated", type=click.Choice(["inherit", "auto", "manual", "off"]), default="inherit", show_default=True,
              help="Whether readers have to ask.")  # fmt: skip
@click.option("--create-pr", is_flag=True, help="As a pull request.")
@click.option("--revision", help="Branch, or refs/pr/N.")
@click.option("--tag", help="Put on the commit.")
@click.option("--base-model", help="Hub id of the base, where the model was made from a folder.")
@click.option("--license", help="Of the base, where its card names none.")
@click.option("--allow-failed-gate", is_flag=True, help="Publish all the same; the card begins with it.")
@gate_options
@click.option("--dry-run", is_flag=True, help="Check, say what would go, and stop.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_options
def command(
    folder: Path, repo_id: str, private: bool | None, gated: Gated, create_pr: bool, revision: str | None, tag: str | None,
    base_model: str | None, license: str | None, allow_failed_gate: bool, max_kl: float | None,
    max_ppl_increase: float | None, min_top1: float | None, dry_run: bool, yes: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Publish FOLDER as REPO_ID: with a card of what was measured, and only if that is inside its budget."""
    from huggingface_hub import HfApi

    from hf_quant.publish.push import prepare, publish
    from hf_quant.publish.secrets import library
    from hf_quant.publish.upload import Target

    if create_pr and (revision or tag or private is not None or gated != "inherit"):
        raise click.UsageError("a pull request changes no settings, branches or tags: --create-pr goes alone")
    bars(quiet or as_json)
    api, target = HfApi(), Target(repo_id, private, create_pr=create_pr, revision=revision, tag=tag)
    ready = prepare(
        folder, target, api, gated=gated, budget=budget(max_kl, max_ppl_increase, min_top1),
        allow_failed_gate=allow_failed_gate, base_model=base_model, license=license,
        say=lambda line: say(line, quiet or as_json),
    )  # fmt: skip
    record = _record(ready)
    plan = _plan(record)
    if dry_run:
        return emit(as_json, quiet, record=record, essential=repo_id, human=plan)
    say(plan, quiet or as_json)
    if (more := library()) is not None:
        say(more, quiet or as_json)
    if not yes:
        _ask()
    made = publish(ready, api, say=lambda line: say(line, quiet))
    record |= {"url": made.url, "revision": made.revision, "commit": made.commit}
    return emit(as_json, quiet, record=record, essential=made.url, human=f"complete and verified: {made.url}")


def _ask() -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("nobody is there to ask: say --yes")
    click.confirm("Upload?", abort=True, err=True)


def _record(ready: Publication) -> dict[str, Any]:
    source, to = ready.source, ready.target
    return {
        "repo_id": to.repo_id, "private": to.private, "gated": to.gated, "create_pr": to.create_pr, "revision": to.revision,
        "tag": to.tag, "base": source["model"], "license": source["license"], "files": ready.names, "bytes": ready.bytes,
    }  # fmt: skip


def _plan(record: dict[str, Any]) -> str:
    seen = {True: "private", False: "public", None: "private if it is new"}[record["private"]]
    where = "as a pull request" if record["create_pr"] else f"on {record['revision'] or 'main'}, {seen}"
    gate = f", gated ({record['gated']})" if record["gated"] else ""
    lines = [
        f"{record['repo_id']}, {where}{gate}", f"base {record['base']}, licence {record['license']}",
        f"{len(record['files'])} files and manifest.json, {record['bytes'] / 1e6:.1f} MB:",
    ]  # fmt: skip
    shown = [printable(each, lines=False) for each in (*lines, *(f"  {name}" for name in record["files"]))]
    return "\n".join(shown)


COMMAND = command
