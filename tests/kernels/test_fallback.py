"""A kernel that cannot be launched is replaced, with a warning; one that fails while it runs is not."""

import logging

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from hf_quant.core.scheme import QuantScheme
from hf_quant.kernels import LinearSpec
from hf_quant.kernels._shared import naive
from hf_quant.kernels._triton import fallback
from hf_quant.kernels._triton.fallback import launched
from hf_quant.kernels.triton_int8 import BACKEND, _in_floating_point
from hf_quant.methods import method


@pytest.fixture(autouse=True)
def _nothing_failed_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_failed", set())


def test_a_refused_launch_is_said_once_and_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def refused() -> Tensor:
        tried.append(1)
        raise OutOfResources(262144, 232448, "shared memory")

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert launched(("triton_wna16", "W4A16-g128"), refused, lambda: torch.ones(2)).sum() == 2
        assert launched(("triton_wna16", "W8A16-g128"), refused, lambda: torch.ones(3)).sum() == 3
    assert len(tried) == 2 and len(caplog.messages) == 2
    assert "triton_wna16, W4A16-g128" in caplog.messages[0] and "shared memory" in caplog.messages[0]


def test_an_error_of_a_running_kernel_is_raised() -> None:
    def broken() -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        launched(("triton_wna16",), broken, lambda: torch.ones(2))


@pytest.mark.parametrize("slug", ["W8A8", "W8A8-static", "W4A8-g64-asym", "W8A8-o5%-columns"])
def test_int8_activations_without_the_kernel(slug: str) -> None:
    from dataclasses import replace

    weight = method("rtn", steps=0).quantize(torch.randn(33, 128), QuantScheme.parse(slug), torch.float32)
    if weight.scheme.activations == "tensor":
        weight = replace(weight, input_scale=torch.tensor([2.5 / 127]))
    prepared = BACKEND().prepare(weight, LinearSpec(weight.scheme, 33, 128, torch.float32, "cuda"))
    x, grid = torch.randn(40, 128), prepared.rounding
    got = _in_floating_point(
        x, prepared.qweight, prepared.scale, prepared.zero, weight.scheme.bits, grid.columns, grid.scale
    )
    wanted = naive.int8_linear(x, weight)
    assert (got.double() - wanted).norm() / wanted.norm() < 1e-5
