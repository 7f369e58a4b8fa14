"""A minute of the fuzz command, always with the same cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.run import many, prepared

CASES = 300


@pytest.mark.parametrize("first", range(0, CASES, 100))
def test_no_spoilt_checkpoint_does_harm(first: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = prepared(Path(tmp_path_factory.getbasetemp()) / "fuzz")
    assert list(many(first, first + 100, home)) == []
