"""Learned codes and scales: the fast loop against a naive one, and what it does with bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_quant.core.numerics import floored
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import HfQuantError, PlanError
from hf_quant.hf.config import HfQuantConfig
from hf_quant.methods import method
from hf_quant.solve import learning
from hf_quant.solve.block import Block, use
from hf_quant.solve.hidden_states import HiddenStates
from hf_quant.solve.latent import EDGE, NEAR, UNIT, Latent, offset_of
from hf_quant.solve.recipes import Decision, preset
from hf_quant.solve.result import Recipe, Solved

NOTHING: Any = ((), {})
SCHEME = QuantScheme.parse("W2A16-g32-asym-o4%")
LAYERS = {"b.up_proj": SCHEME, "b.down_proj": SCHEME}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up_proj, self.down_proj = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.up_proj(x).relu())  # type: ignore[no-any-return]


def begun() -> tuple[Block, Solved]:
    """A block that computes with codes which rounding to nearest has chosen."""
    block, made = Block("b", Mlp(), LAYERS, NOTHING, NOTHING), Solved()
    for name in LAYERS:
        weight = block.module.get_submodule(block.local(name)).weight.data.clone()
        made.codes[name] = method("rtn").quantize(weight, SCHEME, torch.bfloat16)
        made.offsets[name] = offset_of(weight, made.codes[name])
    use(block, made.codes)
    return block, made


def test_learning_starts_half_way_between_weights_and_their_codes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 96)
    quantized = method("rtn").quantize(weight, QuantScheme.parse("W3A16-g32-asym"), torch.bfloat16)
    latent = Latent(quantized, offset_of(weight, quantized))
    codes, scale = quantized.codes().double().view(16, 3, 32), quantized.scale.double()[..., None]
    away = weight.double().view(16, 3, 32) / scale + quantized.zeros().double()[..., None] - codes
    wanted = (codes + NEAR * away.clamp(-EDGE, EDGE)).clamp(0, 7)
    assert (latent.place.double() - wanted).abs().max() <= UNIT / 2 + 1e-6
    assert torch.equal(latent.quantized().codes(), quantized.codes())


class Through(torch.autograd.Function):
    """What is given goes out, and the gradient goes to what it was made from."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, made: Tensor) -> Tensor:
        return made.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def real(start: QuantizedTensor, place: Tensor, factor: Tensor) -> Tensor:
    """What the codes of one layer mean, one group after the other."""
    rows = []
    for n in range(len(start.scale)):
        groups = []
        for g in range(start.scale.shape[1]):
            own, scale = place[n, 32 * g : 32 * g + 32], start.scale[n, g].float() * factor[n, g]
            codes = Through.apply(own, own.round().clamp(0, 3))
            groups.append((codes - start.zeros()[n, g].float()) * Through.apply(scale, floored(scale, torch.bfloat16)))
        row = torch.cat(groups)
        assert start.outliers is not None
        for k, value in zip(start.outliers.index[n].tolist(), start.outliers.value[n].float(), strict=True):
            row = torch.cat([row[:k], value[None], row[k + 1 :]])
        rows.append(row)
    return torch.stack(rows)


def naive(states: Tensor, wanted: Tensor, epochs: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The learning rule, weight by weight as it is written: codes and scales of each layer."""
    _, made = begun()
    starts = {name: Latent(made.codes[name], made.offsets[name]).place.data for name in LAYERS}
    places = {name: start.flatten(1).requires_grad_() for name, start in starts.items()}
    factors = {name: torch.ones(each.scale.shape, requires_grad=True) for name, each in made.codes.items()}
    rule = preset("learned", SCHEME).learning
    assert rule is not None
    optimizer = torch.optim.Adam(
        [{"params": [*places.values()], "lr": rule.codes}, {"params": [*factors.values()], "lr": rule.scales}],
        betas=(0.9, 0.95),
    )
    draw, third = torch.Generator().manual_seed(0), epochs // 3
    for epoch in range(epochs):
        alone = epoch < third
        rates, steps = ((0.0, 0.002), 4 * third) if alone else ((0.01, 0.001), 4 * (epochs - third))
        step = 4 * (epoch if alone else epoch - third)
        for number in torch.randperm(4, generator=draw).tolist():
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning._rate(step, steps)
            up, down = (real(made.codes[name], places[name], factors[name]) for name in LAYERS)
            x, y = states[number], wanted[number]
            out = x + (x @ up.T).relu() @ down.T
            loss = ((out - y).square().sum(-1) / y.square().sum(-1)).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for place in places.values():
                place.data.clamp_(0, 3)
            step += 1
    scales = {name: made.codes[name].scale.float() * factors[name].detach() for name in LAYERS}
    return {name: (places[name].detach().round(), floored(scales[name], torch.bfloat16)) for name in LAYERS}


def learned(states: Tensor, wanted: Tensor, epochs: int, size: int = 1) -> tuple[Solved, dict[str, QuantizedTensor]]:
    block, made = begun()
    before = dict(made.codes)
    recipe = Recipe(Decision.of("learned", [SCHEME], epochs), torch.bfloat16)
    with torch.no_grad():
        learning.learn(block, HiddenStates(states, size), HiddenStates(wanted, size), recipe, made)
    for name, each in made.codes.items():  # the block is left computing with what is stored
        assert torch.equal(block.module.get_submodule(block.local(name)).weight, each.dequantize(torch.float32))
    return made, before


def test_the_fast_loop_does_what_the_naive_one_does() -> None:
    torch.manual_seed(0)
    states = torch.randn(5, 12, 32)
    states[4] = states[0]  # what helps here helps on the text held out
    with torch.no_grad():
        wanted = Mlp()(states)
    made, before = learned(states, wanted, 24)
    assert made.steps == {name: ["learned"] for name in LAYERS} and "held-out" in made.notes["b"][0]
    for name, (codes, scale) in naive(states, wanted, 24).items():
        assert not torch.equal(scale, before[name].scale.float())
        own = made.codes[name]
        assert own.outliers is not None
        here = torch.ones_like(codes).scatter_(1, own.outliers.index.long(), 0).bool()
        assert (own.codes() == codes)[here].double().mean() > 0.99  # sums in another order
        torch.testing.assert_close(made.codes[name].scale.float(), scale, rtol=2**-7, atol=0)


def test_long_sequences_of_a_batch_are_learned_from_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What their gradients need is in memory for one of them alone, and they come to the same."""
    torch.manual_seed(0)
    states = torch.randn(10, 12, 32)
    with torch.no_grad():
        wanted = Mlp()(states)
    together, _ = learned(states, wanted, 12, 2)
    sizes, run = set(), Mlp.forward

    def forward(self: Mlp, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            sizes.add(len(x))
        return run(self, x)

    monkeypatch.setattr(Mlp, "forward", forward)
    monkeypatch.setattr(learning, "LONG", 12)
    alone, _ = learned(states, wanted, 12, 2)
    assert sizes == {1}
    for name in LAYERS:
        assert (alone.codes[name].codes() == together.codes[name].codes()).double().mean() > 0.99
        torch.testing.assert_close(alone.codes[name].scale, together.codes[name].scale, rtol=2**-7, atol=0)


def test_nothing_that_is_worse_is_kept() -> None:
    """The text held out wants what the codes give before anything is learned."""
    torch.manual_seed(0)
    states = torch.randn(5, 12, 32)
    with torch.no_grad():
        wanted = torch.cat([Mlp()(states[:4]), begun()[0].module(states[4:])])
    made, before = learned(states, wanted, 3)
    assert made.codes == before and not made.steps


def test_a_loss_that_is_never_finite_ends_it() -> None:
    states = torch.randn(4, 12, 32)
    with pytest.raises(HfQuantError, match="b: the loss of its learned codes is nan, 3 steps in a row"):
        learned(states, states * torch.nan, 3)


def test_where_nothing_is_learned() -> None:
    assert preset("learned", QuantScheme(8)) == preset("calibrated", QuantScheme(8))
    with pytest.raises(PlanError, match="'calibrated' learns nothing; 'learned' does"):
        HfQuantConfig("W3A16-g32", method="calibrated", epochs=3)
    with pytest.raises(PlanError, match="whole number from 1"):
        HfQuantConfig("W3A16-g32", method="learned", epochs=0)
