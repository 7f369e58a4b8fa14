"""Calibration on images, sounds and text together loses less than rounding, on models trained here for seconds.

``benchmarks/calibrated_kinds.py`` does the same for ten kinds of models, trained longer.
"""

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    "name", ["audio classifier (AST)", "convolutional classifier (ResNet)", "vision-language (LLaVA)"]
)
def test_calibrated_is_closer_than_rounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import calibrated_kinds

    rows: list[dict[str, Any]] = calibrated_kinds.measure(name, 40)
    assert len(rows) == 2
    for row in rows:
        assert row["accuracy"] > 0.5 and row["equal bytes"]
        assert row["calibrated"] < 0.7 * row["rtn"]
