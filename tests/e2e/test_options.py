"""A fixed sample of all combinations of options; `benchmarks/options.py` runs them all."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.options import Case, Options, cases

EVERY = 23  # of the cases: no divisor of the number of schemes, formats or places, so every option is in the sample


def sample() -> Sequence[Case]:
    return cases()[::EVERY]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    return Options(tmp_path_factory.mktemp("options"))


@pytest.mark.parametrize("case", sample(), ids=str)
def test_it_works_or_is_refused_at_once(case: Case, options: Options, tmp_path: Path) -> None:
    assert options.fault(case) is None


def test_every_option_is_in_the_sample() -> None:
    for name in ("method", "scheme", "fmt", "place"):
        assert {getattr(case, name) for case in sample()} == {getattr(case, name) for case in cases()}
