"""A fixed sample of `tests.widths`: each width with its own rows, and every kind of scheme somewhere."""

import random

import pytest

from hf_quant import _plugins
from tests.widths import WIDTHS, Case, cases, check_formats, check_method, check_transform

DRAW = random.Random(0)
SAMPLE = [case for k in WIDTHS[:-1] for case in DRAW.sample(list(cases((k,), (1, 3, 33))), 5 if k < 1000 else 2)]
WHOLE_ROWS = [next(c for c in cases((k,), (3,)) if c.scheme.bits == 8) for k in WIDTHS[:-1]]


@pytest.mark.parametrize("case", [*SAMPLE, *WHOLE_ROWS], ids=str)
@pytest.mark.parametrize("name", _plugins.names("methods"))
def test_methods_and_formats(name: str, case: Case) -> None:
    check_formats(check_method(name, case))


@pytest.mark.parametrize("case", SAMPLE[::4], ids=str)
@pytest.mark.parametrize("name", [name for name in _plugins.names("transforms") if name != "drift"])
def test_transforms(name: str, case: Case) -> None:
    check_transform(name, case)
