"""A chart for a notebook: size against KL divergence, as SVG that needs no script and no package."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping
from typing import Any

from hf_quant.publish.page_charts import Chart, ladder_chart

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 320, 64, 20, 16, 42
BLUE, RED, GREY = "#2f81f7", "#e5534b", "#8b949e"
FLOOR = 1e-7  # a logarithm needs more than 0
Place = Callable[[float], float]


def size_against_kl(walk: Mapping[str, Any]) -> str:
    """SVG of every measured model of a ladder with its interval, the budget and the noise floor of the base; "" without any.

    Args:
        walk: As ladder.json holds it.
    """
    chart = ladder_chart(walk)
    if not chart["rungs"]:
        return ""
    every = [
        value for rung in chart["rungs"] for value in (rung["kl"], rung["low"], rung["high"]) if value is not None
    ]
    lines = [(chart["limit"], "allowed", RED), (chart["noise"], "the base in bf16", GREY)]
    x = _scale([rung["mb"] for rung in chart["rungs"]], LEFT, WIDTH - RIGHT, 0.12)
    heights = [math.log10(max(value, FLOOR)) for value in (*every, *(value for value, _, _ in lines if value))]
    to_y = _scale(heights, HEIGHT - BOTTOM, TOP, 0.1)

    def y(value: float) -> float:
        return to_y(math.log10(max(value, FLOOR)))

    parts = [*_axes(chart, x, y, range(math.floor(min(heights)), math.ceil(max(heights)) + 1))]
    for value, label, color in lines:
        parts += _level(y(value), label, color) if value else []
    for rung in chart["rungs"]:
        parts += _point(rung, x(rung["mb"]), y)
    style = "max-width:100%;font:12px sans-serif"
    return (
        f'<svg role="img" aria-label="size against KL divergence" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'style="{style}">{"".join(parts)}</svg>'
    )


def _scale(values: list[float], start: float, end: float, margin: float) -> Place:
    low, high = min(values), max(values)
    room = margin * ((high - low) or 1.0)
    low, high = low - room, high + room
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(chart: Chart, x: Place, y: Place, powers: range) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = [
        _line(LEFT, y(10.0**power), WIDTH - RIGHT, y(10.0**power), GREY, 'opacity="0.3"')
        + _text(LEFT - 6, y(10.0**power) + 4, f"{10.0**power:g}", "end")
        for power in powers
        if TOP <= y(10.0**power) <= bottom
    ]
    parts += [_line(LEFT, bottom, WIDTH - RIGHT, bottom, GREY), _line(LEFT, TOP, LEFT, bottom, GREY)]
    sizes = [rung["mb"] for rung in chart["rungs"]]
    for mb in {min(sizes), max(sizes)}:
        parts.append(_text(x(mb), bottom + 15, f"{mb:.4g}", "middle"))
    middle = (TOP + bottom) / 2
    return [
        *parts,
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "size of all weights, MB", "middle"),
        f'<g transform="rotate(-90 14 {middle:.0f})">{_text(14, middle, "KL, nats per token", "middle")}</g>',
    ]


def _level(y: float, label: str, color: str) -> list[str]:
    shown = _text(WIDTH - RIGHT, y - 4, label, "end", color)
    return [_line(LEFT, y, WIDTH - RIGHT, y, color, 'stroke-dasharray="5 4"'), shown]


def _point(rung: Chart, x: float, y: Place) -> list[str]:
    color = RED if rung["out"] else BLUE
    tip = f"{rung['name']}: {rung['mb']:.1f} MB, KL {rung['kl']:.5f}, {rung['speed']:.0f} tokens/s"
    parts = [] if rung["low"] is None else [_line(x, y(rung["low"]), x, y(rung["high"]), color, 'stroke-width="2"')]
    dot = f'<circle cx="{x:.1f}" cy="{y(rung["kl"]):.1f}" r="{7 if rung["chosen"] else 5}" fill="{color}">'
    parts.append(f"{dot}<title>{html.escape(tip)}</title></circle>")
    if rung["name"] == "mixed" and not rung["chosen"]:
        return parts  # close to the chosen one: the pointer tells them apart
    left = x > WIDTH - 160
    drop = 18 if rung["chosen"] else 4
    return [*parts, _text(x + (-10 if left else 10), y(rung["kl"]) + drop, rung["name"], "end" if left else "start")]


def _line(x: float, y: float, to_x: float, to_y: float, color: str, more: str = "") -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{color}" {more}/>'


def _text(x: float, y: float, text: str, anchor: str, color: str = "currentColor") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{html.escape(text)}</text>'
