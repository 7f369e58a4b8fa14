"""Pages that are made when the documentation is built, each from the one place where its content is kept.

Commands come from the options of the program, the public Python names from ``hf_quant.__all__``, the fields of results.json from
its schema, benchmarks from ``benchmarks/results``, hosts from ``integrations``, the changelog from CHANGELOG.md; and llms.txt lists
all pages for programs that read documentation. Pages link to the files of the repository, where they can be read too; on the site
these links lead to the pages that were made from them.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

import hf_quant
from hf_quant.cli import main

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BENCHMARKS = ROOT / "benchmarks" / "results"
HOSTS = ROOT / "integrations"
PICTURES = [
    ROOT / "model_cards" / "card.png",
    *sorted((ROOT / "model_cards").glob("ref-llama-16m-mixed/report-*.png")),
]
RESULTS = ROOT / "hf_quant" / "publish" / "schemas" / "results.schema.json"
SOURCES = {
    **{path: f"benchmarks/{path.stem}.md" for path in sorted(BENCHMARKS.glob("*.md"))},
    **{path: f"integrations/{path.parent.name}.md" for path in sorted(HOSTS.glob("*/README.md"))},
}
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "reference/commands.md": commands(),
        "reference/python.md": python(),
        "reference/results.md": results(),
        **copies("benchmarks", "Benchmarks"),
        **copies("integrations", "Hosts"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for picture in PICTURES:
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Let links to files of the repository lead to the pages made from them."""
    start = (DOCS / page.file.src_uri).parent

    def led(link: re.Match[str]) -> str:
        target = site_page(start.joinpath(link[1]).resolve())
        return link[0] if target is None else f"]({os.path.relpath(DOCS / target, start)}"

    return LINK.sub(led, markdown)


def site_page(path: Path) -> str | None:
    """The page or picture of the site that a file of the repository becomes."""
    if path in PICTURES:
        return f"pictures/{path.name}"
    return "reference/results.md" if path == RESULTS else SOURCES.get(path)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Write llms.txt, which lists all pages (llmstxt.org)."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    lines += [f"- [{page.title or page.file.src_uri}]({page.file.src_uri})" for page in nav.pages]
    files.append(File.generated(config, "llms.txt", content="\n".join(lines) + "\n"))
    return nav


def copies(folder: str, title: str) -> dict[str, str]:
    """Pages that stand elsewhere in the repository, and an index of them; links that lead out of the site become text."""
    pages = {
        page: unlinked(path.read_text(encoding="utf-8"))
        for path, page in SOURCES.items()
        if page.startswith(f"{folder}/")
    }
    entries = [f"- [{Path(page).stem}]({Path(page).name}): {heading(text)}" for page, text in pages.items()]
    return {f"{folder}/index.md": "\n".join([f"# {title}", "", *entries, ""]), **pages}


def heading(text: str) -> str:
    """The first heading of a page."""
    return next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")


def unlinked(text: str) -> str:
    """Without links to files of the repository, which the site does not hold."""
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\)", r"\1", text)


def commands() -> str:
    """Every command with its options, from the commands themselves."""
    context = click.Context(main, info_name="hf-quant")
    parts = ["# Commands", "", (main.help or "").partition("\f")[0], ""]
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        parts += section(f"hf-quant {name}", command, context, "##")
        if isinstance(command, click.Group):
            inner = click.Context(command, info_name=name, parent=context)
            for child in command.list_commands(inner):
                parts += section(f"hf-quant {name} {child}", command.commands[child], inner, "###")
    return "\n".join(parts) + "\n"


def section(title: str, command: click.Command, parent: click.Context, level: str) -> list[str]:
    """The help of one command."""
    text = command.get_help(
        click.Context(command, info_name=title.rpartition(" ")[2], parent=parent, max_content_width=100)
    )
    return [f"{level} {title}", "", "```text", text, "```", ""]


def python() -> str:
    """The public names, with their docstrings."""
    text = "# Python\n\nWhat `hf_quant.__all__` lists is public. Nothing else is.\n\n"
    return text + "\n".join(f"::: hf_quant.{name}\n" for name in sorted(hf_quant.__all__, key=str.lower))


def results() -> str:
    """The fields of results.json, from its schema."""
    schema = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = ["# results.json", "", schema.get("description", ""), "", "| field | type | meaning |", "|---|---|---|"]
    return "\n".join([*rows, *fields(schema, "", schema)]) + "\n"


def fields(schema: dict[str, Any], prefix: str, root: dict[str, Any]) -> list[str]:
    """A row for each field, and for those inside it."""
    rows = []
    for name, said in schema.get("properties", {}).items():
        field = {**root["$defs"][said["$ref"].rpartition("/")[2]], **said} if "$ref" in said else said
        kind = field.get("type", "")
        kind = " or ".join(kind) if isinstance(kind, list) else kind
        meaning = " ".join(field.get("description", "").split()).replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {kind} | {meaning} |")
        rows += fields(field, f"{prefix}{name}.", root)
    return rows
