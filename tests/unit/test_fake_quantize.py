"""The rules by which weights, scales and offsets are trained, against loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import PlanError
from hf_quant.methods import method
from hf_quant.training import FakeQuantLinear, why_not
from hf_quant.training.fake_quantize import fake_quant_linear, fake_quantize
from hf_quant.training.loop import Settings, _optimizer
from hf_quant.training.rate import usual_rate

SLUGS = ("W4A16-g16", "W3A16-g16-asym", "W2A16-g32-asym", "W8A16-g-1", "W2A16-g16")


def naive(grad: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> tuple[Tensor, ...]:
    """The rounded weight, and the gradients of weight, scale and offset from that of the rounded weight."""
    n, k = weight.shape
    size = k // scale.shape[1]
    qmax = 2**bits - 1
    rounded, to_weight = torch.zeros_like(weight), torch.zeros_like(weight)
    to_scale, to_offset = torch.zeros_like(scale), torch.zeros_like(scale)
    for row in range(n):
        for column in range(k):
            group = column // size
            s, w, g = scale[row, group].item(), weight[row, column].item(), grad[row, column].item()
            zero = 2 ** (bits - 1) if offset is None else min(max(round(offset[row, group].item() / s), 0), qmax)
            step = round(w / s)
            code = min(max(step + zero, 0), qmax)
            rounded[row, column] = (code - zero) * s
            if code == step + zero:
                to_weight[row, column] = g
                to_scale[row, group] += g * (step - w / s)
            elif offset is None:
                to_scale[row, group] += g * (code - zero)
            else:  # the ends of the range are -offset and qmax * scale - offset
                to_scale[row, group] += g * code
                to_offset[row, group] -= g
    by = 1 / math.sqrt(size * qmax)
    return rounded, to_weight, to_scale * by, to_offset * by


def example(slug: str) -> tuple[QuantScheme, Tensor, Tensor, Tensor | None]:
    """A weight that is clipped on both sides, and its grid; float64."""
    scheme = QuantScheme.parse(slug)
    weight = torch.randn(5, 64, dtype=torch.float64)
    start = method("rtn").quantize(weight, scheme, torch.float32)
    scale = start.scale.double() * 0.7
    offset = None if scheme.symmetric else start.zeros().double() * scale * 1.1
    return scheme, weight, scale, offset


@pytest.mark.parametrize("slug", SLUGS)
def test_gradients_are_those_of_the_naive_loop(slug: str) -> None:
    scheme, weight, scale, offset = example(slug)
    parts = [part.requires_grad_() for part in (weight, scale, offset) if part is not None]
    made = fake_quantize(weight, scale, offset, scheme, torch.float32, torch.float64)
    grad = torch.randn_like(made)
    made.backward(grad)
    with torch.no_grad():
        rounded, *gradients = naive(grad, weight, scale.float().double(), offset, scheme.bits)
    torch.testing.assert_close(made.detach(), rounded)
    assert (gradients[0] == 0).any()  # some are clipped
    for part, expected in zip(parts, gradients, strict=False):
        torch.testing.assert_close(part.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_product_has_the_gradients_of_its_parts(slug: str) -> None:
    """Those of the weight are straight-through; that of the input is a true gradient."""
    scheme, weight, scale, offset = example(slug)
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    found, expected = [], []
    for product in (True, False):
        parts = [p.detach().clone().requires_grad_() for p in (x, weight, scale, offset) if p is not None]
        own = parts[3] if offset is not None else None
        if product:
            y = fake_quant_linear(parts[0], parts[1], parts[2], own, scheme, torch.float32)
        else:
            y = parts[0] @ fake_quantize(parts[1], parts[2], own, scheme, torch.float32, torch.float64).T
        y.square().sum().backward()
        (found if product else expected).extend([y.detach(), *(part.grad for part in parts)])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.autograd.gradcheck(
        lambda each: fake_quant_linear(each, weight, scale, offset, scheme, torch.float32), (x.requires_grad_(),)
    )


def test_nothing_rounded_is_kept_for_the_backward_pass() -> None:
    scheme, weight, scale, _ = example("W4A16-g16")
    x = torch.randn(3, 64, requires_grad=True)
    master = weight.float().requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fake_quant_linear(x, master, scale.float(), None, scheme, torch.bfloat16)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() >= weight.numel()} == {master.data_ptr()}


@pytest.mark.parametrize("slug", ["W4A16-g32", "W2A16-g64-asym"])
@pytest.mark.parametrize("peaked", [True, False])
def test_the_layer_is_what_is_stored_whatever_happens_to_its_scales(slug: str, peaked: bool) -> None:
    """Also of weights with peaks and outliers, and scales that training has driven below zero."""
    scheme = QuantScheme.parse(slug)
    weight = torch.distributions.Laplace(0.0, 0.01).sample((24, 128)) if peaked else torch.randn(24, 128)
    weight[:, 5] *= 40
    weight[3] = 0
    layer = FakeQuantLinear(
        weight, method("rtn").quantize(weight, scheme, torch.bfloat16), bias=None, dtype=torch.bfloat16
    )
    with torch.no_grad():
        layer.weight_scale[1, 0] = -0.5
        layer.weight_scale.mul_(1 + 0.1 * torch.rand_like(layer.weight_scale))
        if layer.weight_offset is not None:
            layer.weight_offset.add_(0.3 * torch.randn_like(layer.weight_offset) * layer.weight_scale)
    x = torch.randn(9, 128, dtype=torch.bfloat16)
    stored = layer.quantized("weight")
    assert stored.scale.dtype == torch.bfloat16
    assert torch.equal(layer(x), torch.nn.functional.linear(x, stored.dequantize(torch.bfloat16)))
    layer(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_masters_stay_in_float32() -> None:
    weight = torch.randn(8, 64)
    start = method("rtn").quantize(weight, QuantScheme.parse("W4A16-g32"), torch.float32)
    layer = FakeQuantLinear(weight, start, bias=torch.nn.Parameter(torch.zeros(8)), dtype=torch.float32)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight, weight) and layer.weight_scale.dtype == torch.float32
    assert layer.compute_dtype == torch.bfloat16 and layer.bias.dtype == torch.bfloat16
    assert layer.quantized("weight").scale.dtype == torch.bfloat16


def test_masters_that_were_cast_are_refused() -> None:
    weight = torch.randn(8, 64)
    start = method("rtn").quantize(weight, QuantScheme.parse("W4A16-g32"), torch.float32)
    layer = FakeQuantLinear(weight, start, bias=None, dtype=torch.bfloat16)
    layer.weight.data = layer.weight.data.bfloat16()
    with pytest.raises(PlanError, match=r"float32.*autocast"):
        layer(torch.randn(2, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("slug", "instead"),
    [("W4A16-g128-o1%", "W4A16-g128"), ("W8A8-static", "W8A8"), ("W8A8-threshold-o1%-columns", "W8A8")],
)
def test_schemes_that_cannot_be_trained(slug: str, instead: str) -> None:
    reason = why_not(QuantScheme.parse(slug))
    assert reason is not None and reason.endswith(f"{instead} can")
    assert why_not(QuantScheme.parse("W2A16-g64-asym")) is None and why_not(QuantScheme.parse("W4A8-g128")) is None


def test_the_usual_learning_rate_follows_the_distance_between_codes() -> None:
    """A fifth of it over the root of the steps, of all weights alike; and never more than embeddings bear."""
    small, large = layer(QuantScheme.parse("W4A16-g16"), 0.01, 96), layer(QuantScheme.parse("W2A16-g32"), 0.03, 32)
    model = torch.nn.Sequential(small, torch.nn.Linear(4, 4), large)
    assert usual_rate(model, 100) == pytest.approx(0.2 * (0.01 * 96 + 0.03 * 32) / 128 / 10)
    assert usual_rate(small, 10_000) == pytest.approx(2e-5)
    assert usual_rate(model, 1) == 1e-3


def layer(scheme: QuantScheme, distance: float, rows: int) -> FakeQuantLinear:
    weight = torch.randn(rows, 64)
    start = method("rtn").quantize(weight, scheme, torch.float32)
    made = FakeQuantLinear(weight, start, bias=None, dtype=torch.float32)
    made.weight_scale.data.fill_(distance)
    return made


def test_ranges_learn_slower_than_weights() -> None:
    """A scale moves all the weights of its group: at their rate it made a calibrated model worse."""
    parameters = {
        f"l.{name}": torch.nn.Parameter(torch.ones(2)) for name in ("weight", "weight_scale", "weight_offset")
    }
    settings = Settings(steps=1, batch=1, lr=1e-3)
    optimizer = _optimizer(parameters, settings)
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(0) * group["share"]
    for parameter in parameters.values():
        parameter.grad = torch.ones(2)
    optimizer.step()
    moved = {name: 1 - parameter[0].item() for name, parameter in parameters.items()}
    assert moved == pytest.approx({"l.weight": 1e-3, "l.weight_scale": 1e-4, "l.weight_offset": 1e-4}, rel=1e-2)
