"""The chart of a ladder in a notebook."""

from typing import Any
from xml.etree import ElementTree

from hf_quant.publish.inline_chart import HEIGHT, WIDTH, size_against_kl


def rung(name: str, size: int, kl: float, *misses: str) -> dict[str, Any]:
    metric = {"value": kl, "low": kl * 0.9, "high": kl * 1.1, "noise": 0.0001}
    return {
        "name": name, "bytes": size, "bits_per_weight": 4.0, "quality": {"metrics": {"kl": metric}},
        "speed": {"decode": 10.0}, "misses": misses,
    }  # fmt: skip


def test_every_measured_model_is_a_point_inside_the_chart() -> None:
    rungs = [rung("W8 & <more>", 19_000_000, 0.0), rung("mixed", 13_000_000, 0.01), rung("W4", 12_000_000, 0.03, "KL")]
    rungs.append(rung("W2", 9_000_000, 1.0) | {"quality": None})
    walk = {"rungs": rungs, "chosen": "mixed", "chosen_bytes": 13_000_000, "limits": {"max_kl": 0.02}}
    svg = ElementTree.fromstring(size_against_kl(walk))
    points = list(svg.iter("circle"))
    assert ["".join(point.itertext()).partition(":")[0] for point in points] == ["W8 & <more>", "mixed", "W4"]
    assert all(0 < float(p.attrib["cx"]) < WIDTH and 0 < float(p.attrib["cy"]) < HEIGHT for p in points)
    x, y = ([float(point.attrib[axis]) for point in points] for axis in ("cx", "cy"))
    assert x == sorted(x, reverse=True) and y == sorted(y, reverse=True), "smaller is left, less KL is lower"
    assert len({point.attrib["fill"] for point in points}) == 2, "what misses has another colour"


def test_a_ladder_without_measured_models_has_no_chart() -> None:
    assert not size_against_kl({"rungs": [], "chosen": None, "limits": {}})
