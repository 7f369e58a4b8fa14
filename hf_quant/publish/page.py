"""A self-contained HTML page about a folder: its content, its quality, and how it was made. It loads nothing."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, UndefinedError

from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.publish import charts
from hf_quant.publish.facts import read_facts

TITLES = {
    "kl": "KL divergence, nats per token", "perplexity": "perplexity", "base_perplexity": "perplexity of the base",
    "perplexity_ratio": "perplexity over the base's", "top1": "top-1 agreement",
    "embedding_cosine": "cosine of embeddings", "logits_cosine": "cosine of logits",
}  # fmt: skip
MARK = "hf-quant report"  # identifies pages of this package
SHOWN = 12  # layers with the largest errors


def html_page(folder: Path) -> str:
    """HTML from results.json, ladder.json and recipe.json in ``folder``, as far as they exist.

    Raises:
        HfQuantError: There is neither results.json nor ladder.json, or one is damaged.
    """
    results, ladder, recipe = (read_facts(folder, name) or {} for name in ("results", "ladder", "recipe"))
    if not results and not ladder:
        raise HfQuantError(f"{folder}: neither results.json nor ladder.json; measure first, with eval or ladder")
    pictures = []
    if ladder and charts.available() is None:
        pictures.append(("Size against quality", *_both(charts.size_and_kl, ladder)))
        if ladder.get("sensitivity", {}).get("kl"):
            pictures.append(("Where it hurts", *_both(charts.sensitivity, ladder)))
    noise = next((rung["quality"] for rung in ladder.get("rungs", []) if rung["quality"]), None)
    environment = Environment(loader=PackageLoader("hf_quant.publish"), autoescape=True, trim_blocks=True)
    try:
        return environment.get_template("page.html.jinja").render(
            mark=MARK, name=folder.resolve().name, results=results, ladder=ladder, recipe=recipe, pictures=pictures,
            titles=TITLES, noise=noise, layers=(results.get("layers") or [])[:SHOWN],
            recipe_json=json.dumps(recipe, indent=2) if recipe else "",
        )  # fmt: skip
    except UndefinedError as error:
        raise CheckpointError(f"{folder}: recipe.json, results.json or ladder.json: {error.message}") from None


def why_not(out: Path) -> str | None:
    """Why a page cannot be written to ``out``: a file is there that is not a page of this package. None if it can."""
    if not out.exists() and not out.is_symlink():
        return None
    if not out.is_file():
        return "is there already, and is not a file"
    with out.open("rb") as file:
        head = file.read(1000)
    known = f'name="generator" content="{MARK}"'.encode()
    return None if known in head else "is there already, and is not a report of hf-quant: name another file"


def _both(draw: Any, ladder: dict[str, Any]) -> tuple[str, str]:
    """The chart for light and for dark backgrounds, as data URLs."""
    light, dark = (base64.b64encode(draw(ladder, dark)).decode() for dark in (False, True))
    return light, dark
