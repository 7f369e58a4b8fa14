"""Transposes of packed codes, compiled and by PyTorch, beside the codes taken out one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hf_quant import _upwards
from hf_quant.core import words as under_test
from hf_quant.core.words import transposed, transposed_codes
from hf_quant.formats import awq

ORDER = awq.ORDER.tolist()


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(_upwards, "words", lambda: SimpleNamespace(takes=lambda *_: False))
    elif not _upwards.words().takes(some_words(2, 2), some_words(2, 2)):
        pytest.skip("there is no compiled module")
    return str(request.param)


def some_words(rows: int, columns: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32)


@pytest.mark.parametrize("k", [8, 12, 13, 576, 4864])
@pytest.mark.parametrize("n", [8, 64, 896])
def test_codes_are_transposed(way: str, k: int, n: int) -> None:
    words = some_words(k, n // 8)
    packed = transposed_codes(words, ORDER).view(torch.uint8)
    assert packed.shape == (n, (k + 7) // 8 * 4)
    for column in range(0, n, max(1, n // 16)):
        nibble = ORDER.index(column % 8)
        expected = [(int(words[row, column // 8]) >> 4 * nibble) & 15 for row in range(k)]
        stored = [int(packed[column, row // 2]) >> 4 * (row % 2) & 15 for row in range(packed.shape[1] * 2)]
        assert stored == expected + [0] * (len(stored) - k)  # no code behind the last one


def test_chunks_do_not_show(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = some_words(200, 12)
    whole = transposed_codes(words, ORDER)
    monkeypatch.setattr(under_test, "CACHED", 36)
    assert torch.equal(transposed_codes(words, ORDER), whole)
    assert torch.equal(transposed_codes(words.t().contiguous().t(), ORDER), whole)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (72, 576), (608, 896), (33, 70)])
def test_words_are_transposed(way: str, rows: int, columns: int) -> None:
    words = some_words(rows, columns)
    assert torch.equal(transposed(words), words.T)
    assert torch.equal(transposed(words[:, 1:]), words[:, 1:].T)  # rows with a gap between them
    assert torch.equal(transposed(words.T), words)
