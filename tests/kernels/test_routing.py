"""Rows sorted by expert, and cut into tiles."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_quant.kernels import back_in_order, by_expert
from hf_quant.kernels._shared import naive
from hf_quant.kernels._shared.routing import cut, spans

CHOSEN = {
    "some": torch.tensor([[2, 0], [0, 3], [2, 5], [0, 2]]),
    "one": torch.tensor([[3]]),
    "all the same": torch.full((33, 1), 1),
    "elsewhere": torch.full((3, 2), 4),
    "none": torch.empty((0, 2), dtype=torch.int64),
    "many": torch.randint(6, (70, 3), generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_rows_of_an_expert_lie_together(name: str) -> None:
    chosen = CHOSEN[name]
    ends, order = by_expert(chosen, 4)
    flat = chosen.flatten()
    assert order.sort().values.tolist() == list(range(flat.numel()))
    assert torch.equal(back_in_order(flat[order], order), flat)
    assert (ends.tolist(), order.tolist()) == naive.by_expert(chosen, 4)
    for i, j, (expert, nothing) in spans(ends, torch.arange(4), None):
        assert nothing is None and i < j and (flat[order[i:j]] == expert).all()


@pytest.mark.parametrize("size", [1, 8, 32])
@pytest.mark.parametrize("name", [name for name in CHOSEN if name != "none"])
def test_every_row_is_in_one_tile(name: str, size: int) -> None:
    ends, order = by_expert(CHOSEN[name], 4)
    tiles = [tuple(tile) for tile in cut(ends, order.numel(), size).tolist()]
    used = [tile for tile in tiles if tile[0] >= 0]
    assert used == tiles[: len(used)] == naive.cut(ends.tolist(), size)


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values: asking for one raises."""
    with FakeTensorMode():
        chosen = torch.empty((21, 2), dtype=torch.int64)
        ends, order = by_expert(chosen, 4)
        assert cut(ends, 42, 8).shape == (9, 3) and back_in_order(torch.empty(42, 3), order).shape == (42, 3)
