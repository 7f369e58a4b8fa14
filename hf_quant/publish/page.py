"""A self-contained HTML page about one model, or two side by side: content, quality, speed, and how it was made.

It loads nothing: styles, data and charts (`hf_quant.publish.page_charts`) are in the one file, and its numbers are readable
without its script, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, UndefinedError

from hf_quant.errors import CheckpointError
from hf_quant.evaluation.results import amount_of, interval_shown
from hf_quant.publish import page_charts
from hf_quant.publish.markdown import number, percent, size
from hf_quant.publish.page_model import Model, Sample
from hf_quant.publish.sentences import OF_BASE, TITLES, positions

NONE = "\u2013"  # a dash, where there is no number
MARK = "hf-quant report"  # identifies pages of this package
SHOWN: dict[str, Callable[[float], str]] = {
    "percent": percent,
    "perplexity": "{:.3f}".format,
    "ratio": "{:.4f}".format,
}
Cell = tuple[str, str]  # a value, and its interval


def html_page(folder: Path, other: Path | None = None, samples: Sequence[Sample] = ()) -> str:
    """HTML from results.json, ladder.json and recipe.json in ``folder``, as far as they exist.

    Args:
        folder: A model that was measured.
        other: Another one, to be shown beside it.
        samples: What the base and the model in ``folder`` say.

    Raises:
        HfQuantError: There is neither results.json nor ladder.json, or one is damaged.
    """
    models = [Model.of(path) for path in (folder, other) if path is not None]
    environment = Environment(
        loader=PackageLoader("hf_quant.publish"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": size, "percent": percent, "number": number}
    try:
        return environment.get_template("page.html.jinja").render(
            mark=MARK, title=" and ".join(model.name for model in models), models=models, samples=samples,
            quality=_quality(models), layers=_layers(models), charts=page_charts.of(models), speeds=_speeds(models),
            amount=amount_of,
        )  # fmt: skip
    except UndefinedError as error:
        raise CheckpointError(f"{folder}: recipe.json, results.json or ladder.json: {error.message}") from None


def _quality(models: Sequence[Model]) -> list[tuple[str, list[Cell], str]]:
    """A row for each measure: its title, value and interval of each model, and the noise floor of the base."""
    measured = [model.results.get("quality") or {"metrics": {}, "quantiles": {}} for model in models]
    names = dict.fromkeys(name for quality in measured for kind in ("metrics", "quantiles") for name in quality[kind])
    order = {name: i for i, name in enumerate(TITLES)}
    rows = []
    for name in sorted(names, key=lambda name: order.get(name, len(order))):
        title, kind = TITLES.get(name, (name, "number"))
        shown = SHOWN.get(kind, number)
        metrics = [q["metrics"][name] for q in measured if name in q["metrics"]]
        noise = metrics[0]["noise"] if metrics else None
        counts = dict.fromkeys(map(positions, metrics))
        floor = NONE if name in OF_BASE or noise is None else shown(noise)
        rows.append(
            (
                title + "".join(counts if len(counts) == 1 else ()),
                [_cell(quality, name, shown) for quality in measured],
                floor,
            )
        )
    return rows


def _cell(quality: Mapping[str, Any], name: str, shown: Callable[[float], str]) -> Cell:
    if (metric := quality["metrics"].get(name)) is not None:
        within = " (within noise)" if metric["within_noise"] else ""
        return shown(metric["value"]) + within, "" if metric["low"] is None else interval_shown(metric, shown)
    return (shown(quality["quantiles"][name]), "") if name in quality["quantiles"] else (NONE, "")


def _layers(models: Sequence[Model]) -> list[tuple[str, list[Mapping[str, Any] | None]]]:
    """Each layer with what every model did to it; the largest error of the first one comes first."""
    by_name = [{layer["layer"]: layer for layer in model.results.get("layers") or []} for model in models]
    for layers, model in zip(by_name, models, strict=True):  # layers whose errors say nothing still have a scheme
        for name, slug in (model.recipe.get("schemes") or {}).items():
            layers.setdefault(name, {"layer": name, "scheme": slug, "error": None, "sqnr_db": None})
    names = dict.fromkeys(name for layers in by_name for name in layers)
    return [(name, [layers.get(name) for layers in by_name]) for name in names]


def _speeds(models: Sequence[Model]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Who was measured, its memory, and one of its speeds."""
    rows = []
    for model in models:
        bench = model.results.get("bench") or {}
        for role in ("base", "model"):
            name = "the base" if role == "base" else model.name if len(models) > 1 else "the model"
            rows += [(name, bench[role], speed) for speed in bench.get(role, {}).get("speed", [])]
    return rows


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
