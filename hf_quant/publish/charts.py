"""Charts of a ladder and of layer errors, as PNG for light and dark backgrounds. Needs matplotlib (``hf-quant[report]``)."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from hf_quant.errors import HfQuantError

INK = {False: ("#1f2328", "#ffffff", "#d0d7de"), True: ("#e6edf3", "#0d1117", "#30363d")}  # text, background, lines
ORDER = {
    kind: i for i, kind in enumerate(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
}
LABEL = 20  # letters of the name of a column
BLUE, RED, GREY = "#2f81f7", "#e5534b", "#8b949e"


def available() -> str | None:
    """Why no charts can be drawn, or None if they can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no charts: pip install 'hf-quant[report]' brings matplotlib"
    return None


def size_and_kl(walk: dict[str, Any], dark: bool) -> bytes:
    """Size against KL divergence, with the speed of each model; models out of budget are red.

    Args:
        walk: ladder.json.
        dark: For a dark background.
    """

    def draw(figure: Any, ink: str) -> None:
        axes = figure.add_subplot()
        rungs = [rung for rung in walk["rungs"] if rung["quality"]]
        for rung in rungs:
            of = rung["quality"]["metrics"]["kl"]
            color = RED if rung["misses"] else BLUE
            x = rung["bytes"] / 1e6
            if of["low"] is not None:
                axes.vlines(x, max(of["low"], 1e-7), max(of["high"], 1e-7), color=color, linewidth=1.5)
            chosen = rung is next((r for r in rungs if _is_chosen(r, walk)), None)
            axes.plot(x, max(of["value"], 1e-7), "D" if chosen else "o", color=color, markersize=9 if chosen else 6)
        middle = (min(r["bytes"] for r in rungs) + max(r["bytes"] for r in rungs)) / 2
        for rung in _labelled(rungs, walk):
            label = f"{rung['name']}, {rung['speed']['decode']:.0f} tokens/s"
            point = (rung["bytes"] / 1e6, max(rung["quality"]["metrics"]["kl"]["value"], 1e-7))
            right, below = rung["bytes"] > middle, rung["name"] == "mixed"  # which is close to another point
            axes.annotate(
                label, point, xytext=(-9 if right else 9, -14 if below else 8), textcoords="offset points", fontsize=9,
                color=ink, ha="right" if right else "left",
            )  # fmt: skip
        limit = walk["limits"].get("max_kl")
        if limit:
            axes.axhline(limit, color=RED, linestyle="--", linewidth=1)
            axes.annotate("allowed", (0.99, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          fontsize=9, color=RED)  # fmt: skip
        noise = next((r["quality"]["metrics"]["kl"]["noise"] for r in rungs), None)
        if noise:
            axes.axhline(noise, color=GREY, linestyle=":", linewidth=1.2)
            axes.annotate("the base in bf16", (0.99, noise), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          fontsize=9, color=GREY)  # fmt: skip
        axes.set_yscale("log")
        axes.margins(x=0.08, y=0.15)
        axes.set_xlabel("size of all weights, MB")
        axes.set_ylabel("KL divergence to the base, nats per token")
        axes.set_title("Size against quality; labels: decode speed at batch 1", fontsize=11)
        axes.grid(alpha=0.4)

    return _png(draw, dark, (7.2, 4.6))


def sensitivity(walk: dict[str, Any], dark: bool) -> bytes:
    """The cost of each group alone: block by kind of layer, with one panel for each width.

    Args:
        walk: ladder.json, with sensitivities.
        dark: For a dark background.
    """
    from matplotlib.colors import LogNorm

    bits, costs = walk["sensitivity"]["bits"], walk["sensitivity"]["kl"]
    places = places_of(costs)
    blocks = sorted({block for block, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    every = [max(value, 1e-9) for values in costs.values() for value in values]
    norm = LogNorm(min(every), max(*every, 1.01 * min(every)))

    def draw(figure: Any, ink: str) -> None:
        panels = figure.subplots(1, len(bits), squeeze=False, sharey=True)[0]
        for i, (axes, width) in enumerate(zip(panels, bits, strict=True)):
            grid = [[float("nan")] * len(kinds) for _ in blocks]
            for group, (block, kind) in places.items():
                grid[blocks.index(block)][kinds.index(kind)] = max(costs[group][i], 1e-9)
            image = axes.imshow(grid, aspect="auto", cmap="viridis", norm=norm)
            axes.set_xticks(range(len(kinds)), [_label(kind) for kind in kinds], rotation=35, ha="right")
            axes.set_yticks(range(len(blocks)), blocks) if len(blocks) <= 40 else None
            axes.set_title(f"{width} bits", fontsize=11)
        panels[0].set_ylabel("block")
        bar = figure.colorbar(image, ax=list(panels))
        bar.set_label("KL it causes alone, nats per token", color=ink)
        bar.ax.tick_params(which="both", colors=ink)

    return _png(draw, dark, (2.4 + 2.6 * len(bits), 1.8 + 0.26 * min(len(blocks), 40)))


def layers(errors: list[dict[str, Any]], dark: bool) -> bytes:
    """The error of each layer, with its bits: block by kind of layer.

    Args:
        errors: ``layers`` of results.json.
        dark: For a dark background.
    """
    places = places_of([layer["layer"] for layer in errors])
    blocks = sorted({block for block, _ in places.values()})
    kinds = sorted(
        {kind for _, kind in places.values()}, key=lambda kind: (kind not in ORDER, ORDER.get(kind, 0), kind)
    )

    def draw(figure: Any, ink: str) -> None:
        axes = figure.add_subplot()
        grid = [[float("nan")] * len(kinds) for _ in blocks]
        for layer in errors:
            block, kind = places[layer["layer"]]
            grid[blocks.index(block)][kinds.index(kind)] = 100 * layer["error"]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
        top = max(100 * layer["error"] for layer in errors)
        for layer in errors if len(blocks) <= 40 else []:
            block, kind = places[layer["layer"]]
            match = re.match(r"W(\d+)", layer["scheme"])
            axes.text(
                kinds.index(kind), blocks.index(block), match[1] if match else "", ha="center", va="center", fontsize=8,
                color="black" if 100 * layer["error"] > 0.6 * top else "white",
            )  # fmt: skip
        axes.set_xticks(range(len(kinds)), [_label(kind) for kind in kinds], rotation=35, ha="right")
        axes.set_yticks(range(len(blocks)), blocks) if len(blocks) <= 40 else None
        axes.set_ylabel("block")
        axes.set_title("Relative error of the weights; in each field, the bits", fontsize=11)
        bar = figure.colorbar(image, ax=axes)
        bar.set_label("%", color=ink)
        bar.ax.tick_params(which="both", colors=ink)

    return _png(draw, dark, (7.2, 1.6 + 0.3 * min(len(blocks), 40)))


def _is_chosen(rung: dict[str, Any], walk: dict[str, Any]) -> bool:
    return bool(rung["name"] == walk["chosen"] and rung["bytes"] == walk.get("chosen_bytes"))


def _labelled(rungs: list[dict[str, Any]], walk: dict[str, Any]) -> list[dict[str, Any]]:
    """All uniform rungs, and of the mixed ones the chosen or the last one: they are close together."""
    mixed = [rung for rung in rungs if rung["name"] == "mixed"]
    shown = next((rung for rung in mixed if _is_chosen(rung, walk)), mixed[-1] if mixed else None)
    return [rung for rung in rungs if rung["name"] != "mixed" or rung is shown]


def places_of(layers: Iterable[str]) -> dict[str, tuple[int, str]]:
    """For each layer or group the number of its block (-1 outside of blocks), and its name there: no two have one place."""
    inside = {layer: re.search(r"\.(\d+)\.(.+)$", layer.removesuffix(".weight")) for layer in layers}
    names = {layer: (int(match[1]), match[2]) if match else (-1, layer) for layer, match in inside.items()}
    short = {
        layer: (block, name.rpartition(".")[2]) if block >= 0 else (block, name)
        for layer, (block, name) in names.items()
    }
    count = Counter(short.values())
    return {layer: place if count[place] == 1 else names[layer] for layer, place in short.items()}


def _label(kind: str) -> str:
    """A name that fits below a column."""
    kind = kind.replace("_proj", "")
    return kind if len(kind) <= LABEL else f"\N{HORIZONTAL ELLIPSIS}{kind[1 - LABEL :]}"


def _png(draw: Callable[[Any, str], None], dark: bool, size: tuple[float, float]) -> bytes:
    if (reason := available()) is not None:
        raise HfQuantError(reason)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, ground, lines = INK[dark]
    colors: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), ink
    )
    colors |= {"axes.edgecolor": lines, "grid.color": lines, "axes.facecolor": ground, "figure.facecolor": ground}
    with rc_context(colors):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        draw(figure, ink)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
