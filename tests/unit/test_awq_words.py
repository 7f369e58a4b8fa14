"""Interleaved words of AWQ's GEMM layout, transposed in words, beside the nibbles taken out one by one."""

from __future__ import annotations

import pytest
import torch

from hf_quant.formats import awq


@pytest.mark.parametrize("k", [8, 12, 13, 576, 4864])
@pytest.mark.parametrize("n", [8, 64, 896])
def test_words_are_transposed(k: int, n: int) -> None:
    words = torch.randint(-(2**31), 2**31, (k, n // 8), dtype=torch.int32)
    packed = awq._transposed(words)
    assert packed.shape == (n, (k + 1) // 2) and packed.dtype is torch.uint8
    for column in range(0, n, max(1, n // 16)):
        nibble = awq.ORDER.tolist().index(column % 8)
        expected = [(int(words[row, column // 8]) >> 4 * nibble) & 15 for row in range(k)]
        stored = [int(packed[column, row // 2]) >> 4 * (row % 2) & 15 for row in range(k)]
        assert stored == expected
        assert k % 2 == 0 or packed[column, -1] < 16  # no code behind the last one


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.randint(-(2**31), 2**31, (200, 12), dtype=torch.int32)
    whole = awq._transposed(words)
    monkeypatch.setattr(awq, "CACHED", 36)
    assert torch.equal(awq._transposed(words), whole)
    assert torch.equal(awq._transposed(words.t().contiguous().t()), whole)
