"""The charts of the report page, as data: its script draws them as wide as the screen is, and answers a pointer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_quant.publish.charts import ORDER, places_of
from hf_quant.publish.markdown import number, percent
from hf_quant.publish.page_model import Model

Chart = dict[str, Any]


def of(models: Sequence[Model]) -> dict[str, Chart]:
    """Name to chart; a name begins with the number of its model, and is in the page where the chart goes."""
    charts: dict[str, Chart] = {}
    top = max((layer["error"] for model in models for layer in model.results.get("layers") or []), default=0.0)
    for i, model in enumerate(models):
        if any(rung["quality"] for rung in model.ladder.get("rungs", [])):
            charts[f"{i}-ladder"] = ladder_chart(model.ladder)
        costs = model.ladder.get("sensitivity") or {}
        for bits, cells in _sensitivity(costs):
            every = [value for values in costs["kl"].values() for value in values]
            label = f"{bits} bits"
            charts[f"{i}-sensitivity-{bits}"] = {"kind": "heat", "cells": cells, "top": max(every), "label": label}
        if model.results.get("layers"):
            layers = model.results["layers"]
            places = places_of([layer["layer"] for layer in layers])
            cells = _sorted([_cell(layer, *places[layer["layer"]]) for layer in layers])
            charts[f"{i}-layers"] = {"kind": "heat", "cells": cells, "top": top, "label": "error of each layer"}
    for what in ("prefill", "decode"):
        if rows := _speeds(models, what):
            charts[what] = {"kind": "bars", "rows": rows, "unit": f"{what}, tokens per second"}
    return charts


def ladder_chart(walk: Mapping[str, Any]) -> Chart:
    """Size, quality and speed of every model of a ladder that was measured.

    Args:
        walk: As ladder.json holds it.
    """
    rungs = []
    for rung in walk["rungs"]:
        if rung["quality"]:
            kl = rung["quality"]["metrics"]["kl"]
            rungs.append(
                {
                    "name": rung["name"], "mb": rung["bytes"] / 1e6, "bits": rung["bits_per_weight"], "kl": kl["value"],
                    "low": kl["low"], "high": kl["high"], "speed": rung["speed"]["decode"], "out": bool(rung["misses"]),
                    "chosen": rung["name"] == walk["chosen"] and rung["bytes"] == walk.get("chosen_bytes"),
                }
            )  # fmt: skip
    noise = next((rung["quality"]["metrics"]["kl"]["noise"] for rung in walk["rungs"] if rung["quality"]), None)
    return {"kind": "scatter", "rungs": rungs, "limit": walk["limits"].get("max_kl"), "noise": noise}


def _sensitivity(costs: Mapping[str, Any]) -> Iterator[tuple[int, list[Chart]]]:
    places = places_of(costs.get("kl") or [])
    for i, bits in enumerate(costs.get("bits") or []):
        cells = []
        for group, values in costs["kl"].items():
            block, kind = places[group]
            tip = f"{group}\nin {bits} bits alone: KL {number(values[i])}"
            cells.append({"block": block, "kind": kind, "value": values[i], "text": "", "tip": tip})
        if cells:
            yield bits, _sorted(cells)


def _cell(layer: Mapping[str, Any], block: int, kind: str) -> Chart:
    bits = re.match(r"W(\d+)", layer["scheme"])
    ratio = "" if layer["sqnr_db"] is None else f", signal to noise {layer['sqnr_db']:.1f} dB"
    tip = f"{layer['layer']}\n{layer['scheme']}\nerror {percent(layer['error'], '%.2f')}{ratio}"
    return {"block": block, "kind": kind, "value": layer["error"], "text": bits[1] if bits else "", "tip": tip}


def _sorted(cells: list[Chart]) -> list[Chart]:
    """In the order of the layers inside a block, so that the chart has its columns in that order."""
    return sorted(cells, key=lambda cell: (cell["kind"] not in ORDER, ORDER.get(cell["kind"], 0), cell["kind"]))


def _speeds(models: Sequence[Model], what: str) -> list[Chart]:
    """Bars by batch size: of each model, and of the base that was measured with it."""
    by_batch: dict[int, list[Chart]] = {}
    for i, model in enumerate(models):
        bench = model.results.get("bench") or {}
        for role in ("base", "model"):
            name = model.name if role == "model" else f"the base, with {model.name}" if len(models) > 1 else "the base"
            color = "soft" if role == "base" else "two" if i else "one"
            for speed in (bench.get(role) or {}).get("speed", []):
                tip = f"{name}, batch {speed['batch']}\n{speed[what]:.0f} tokens per second ± {speed[f'{what}_spread'] / 2:.0%}"
                by_batch.setdefault(speed["batch"], []).append({"value": speed[what], "color": color, "tip": tip})
    return [{"name": f"batch {batch}", "values": values} for batch, values in by_batch.items()]
