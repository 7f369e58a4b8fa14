"""What the compiled module does to values while a model is loaded, beside PyTorch."""

from __future__ import annotations

import pytest
import torch

from hf_quant.kernels._native import compiled, finite

pytestmark = pytest.mark.skipif(compiled._cpu is None, reason="the compiled module is not built")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 7, 65536, 65537, 200_003])
def test_one_number_that_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype, count: int) -> None:
    numbers = (torch.randn(count) * (torch.finfo(dtype).max / 8)).to(dtype)
    numbers[0] = torch.finfo(dtype).max
    assert finite.all_finite(numbers) and finite._by_sums(numbers)
    for odd in (float("nan"), float("inf"), float("-inf")):
        for at in {0, count // 2, count - 1}:
            spoiled = numbers.clone()
            spoiled[at] = odd
            assert not finite.all_finite(spoiled) and not finite._by_sums(spoiled), (odd, at)


def test_numbers_of_any_shape_and_order() -> None:
    numbers = torch.ones(6, 10, dtype=torch.bfloat16)
    numbers[1, 3] = float("nan")
    assert not finite.all_finite(numbers) and not finite.all_finite(numbers.t())
    assert finite.all_finite(numbers[::2]) and finite.all_finite(torch.empty(0)) and finite.all_finite(torch.ones(()))
    assert not finite.all_finite(numbers.double()) and finite.all_finite(torch.full((3,), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 576])
@pytest.mark.parametrize("groups", [1, 9, 38])
def test_scales_in_blocks_of_rows(dtype: torch.dtype, n: int, groups: int) -> None:
    values = torch.randint(0, 256, (n, groups)).to(dtype)
    blocks = compiled._in_blocks(values)
    expected = torch.zeros(-(-n // 16) * 16, groups, dtype=dtype)
    expected[:n] = values
    assert torch.equal(blocks, expected.view(-1, 16, groups).transpose(1, 2)) and blocks.is_contiguous()
    assert torch.equal(compiled._in_rows(blocks, n), values) and blocks.dtype is dtype
    assert torch.equal(compiled._in_blocks(values.t().contiguous().t()), blocks)


@pytest.mark.parametrize("call", ["blocks", "finite"])
def test_what_cannot_be_read_is_refused(call: str) -> None:
    module = compiled._cpu
    assert module is not None
    arguments = {
        "blocks": [(0, 0, 2, 1, 1, 1), (1, 1, 3, 1, 1, 1), (1, 1, 2, 0, 1, 1)],
        "finite": [(0, 0, 1, 1), (1, 9, 1, 1)],
    }
    for given in arguments[call]:
        with pytest.raises(ValueError, match=call):
            getattr(module, call)(*given)
