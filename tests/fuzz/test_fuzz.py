"""A minute of the fuzz command, always with the same cases."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from hf_quant.kernels._shared import ops, registration
from tests.fuzz import operations
from tests.fuzz.run import OPERATIONS, many, prepared
from tests.kernels.operations import arguments, built

CASES = 300


@pytest.mark.parametrize("first", range(0, CASES, 100))
def test_no_spoilt_checkpoint_does_harm(first: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = prepared(Path(tmp_path_factory.getbasetemp()) / "fuzz")
    assert list(many(range(first, first + 100), home)) == []


def test_operations_are_right_or_refuse(tmp_path: Path) -> None:
    cases = [case for case in range(CASES, CASES + 2000) if case % 5 == OPERATIONS]
    cases.append(216342)  # a tensor of one element for a number
    assert list(many(cases, tmp_path)) == []


def test_cases_of_operations_reach_all_of_them() -> None:
    with torch.random.fork_rng():
        assert {operations.case_of(Random(case))[0] for case in range(200)} == set(filter(built, ops.OPS))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda x, *_: torch.as_strided(x, (2, 4), (1, 2)).sum(-1), "results differ from those of contiguous tensors"),
        (lambda x, *_: x[:, :5].contiguous(), "announced"),
        (lambda x, *_: x.nothing, "AttributeError"),
        (lambda x, *_: registration.Arguments("dequant_linear", x).refuse("no"), "names no operation or no argument"),
    ],
)  # fmt: skip
def test_what_counts_as_a_fault(wrong: object, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, *rest = arguments("dequant_linear", dtype=torch.float32)
    strided = torch.stack([x, x], -1)[..., 0]
    assert operations.outcome("dequant_linear", (strided, *rest)).state == "right"
    monkeypatch.setattr(operations, "called", lambda name: wrong)
    found = operations.outcome("dequant_linear", (strided, *rest))
    assert found.state == "fault" and said in found.said
