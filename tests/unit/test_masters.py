"""Float32 masters: many updates that are too small for 16 bits add up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_quant.training.masters import Masters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_small_updates_add_up(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    masters = Masters({"p": parameter})
    optimizer = torch.optim.SGD(masters.values.values(), lr=1e-4)
    for _ in range(100):
        (parameter.float() * torch.tensor([1.0, 2.0, 0.0])).sum().backward()
        masters.take_gradients()
        optimizer.step()
        masters.round()
        optimizer.zero_grad()
    expected = torch.tensor([0.99, 0.98, 1.0])
    torch.testing.assert_close(masters.values["p"].detach().float(), expected)
    assert torch.equal(parameter, masters.values["p"].to(dtype)) and parameter.dtype is dtype
    assert (masters.values["p"] is parameter) == (dtype in (torch.float32, torch.float64))


def test_values_go_back() -> None:
    parameters = {"long": nn.Parameter(torch.ones(2)), "short": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    masters = Masters(parameters)
    copies = masters.copied()
    assert masters.values["long"] is parameters["long"] and masters.values["short"] is not parameters["short"]
    masters.set({"long": torch.full((2,), 3.0), "short": torch.full((2,), 1.001)})
    assert parameters["long"].tolist() == [3, 3] and parameters["short"].tolist() == [1, 1]
    assert masters.values["short"][0].item() == pytest.approx(1.001)
    masters.set(copies)
    assert parameters["long"].tolist() == [1, 1] and masters.values["short"].tolist() == [1, 1]
