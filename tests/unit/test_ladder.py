import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from hf_quant.bench import memory
from hf_quant.core.scheme import QuantScheme
from hf_quant.data.text import halves, split
from hf_quant.errors import DiskError
from hf_quant.evaluation.gate import Budget
from hf_quant.evaluation.knapsack import frontier
from hf_quant.evaluation.results import Estimate, Quality
from hf_quant.evaluation.sensitivity import groups, rounded, sensitivities
from hf_quant.hf import HfQuantConfig
from hf_quant.hf.plan import make_plan
from hf_quant.jobs.ladder import _finish
from hf_quant.jobs.walk import MIXED, Ladder, Limits, Rung, Walk, _speed, _Table
from hf_quant.methods import method
from hf_quant.publish import charts
from hf_quant.solve.recipes import Decision

W = {bits: QuantScheme(bits, 32) for bits in (8, 4, 3, 2)}


@pytest.mark.parametrize("seed", range(20))
def test_knapsack_is_exact(seed: int) -> None:
    """Against every combination there is."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 12, (5, 3), generator=draw).tolist()
    costs = torch.rand(5, 3, generator=draw, dtype=torch.float64).tolist()

    def weigh(picks: Sequence[int] | None) -> tuple[int, float]:
        assert picks is not None
        return sum(sizes[i][p] for i, p in enumerate(picks)), sum(costs[i][p] for i, p in enumerate(picks))

    plans = [weigh(picks) for picks in itertools.product(range(3), repeat=5)]
    made = frontier(sizes, costs)

    for budget in (0.8, 1.5, 2.5, 4.0):
        inside = [size for size, cost in plans if cost <= budget]
        if not inside:
            assert made.smallest(budget) is None
        else:
            size, cost = weigh(made.smallest(budget))
            assert size == min(inside) and cost <= budget + 1e-12
    for limit in (10, 25, 40):
        inside_costs = [cost for size, cost in plans if size <= limit]
        if not inside_costs:
            assert made.cheapest(limit) is None
        else:
            size, cost = weigh(made.cheapest(limit))
            assert cost == pytest.approx(min(inside_costs)) and size <= limit


def test_many_groups_stay_tractable() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [4096 * 4096, 4096 * 6144, 4096 * 28672, 14336 * 4096] * 32
    sizes = [[n * bits // 8 for bits in (8, 4, 3, 2)] for n in shapes]
    costs = [(torch.rand(1, generator=draw).item() * torch.tensor([0.001, 0.2, 1, 9])).tolist() for _ in shapes]
    made = frontier(sizes, costs)
    picks = made.smallest(10.0)
    assert picks is not None and len(picks) == 128 and len(set(picks)) > 1
    assert (made.size[1:] > made.size[:-1]).all() and (made.cost[1:] < made.cost[:-1]).all()


def test_groups_are_fused() -> None:
    block = "model.layers.3"
    names = [f"{block}.self_attn.{p}_proj" for p in "qkvo"] + [f"{block}.mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert groups(names) == {
        f"{block}.self_attn.qkv": names[:3], f"{block}.self_attn.o_proj": names[3:4],
        f"{block}.mlp.gate_up": names[4:6], f"{block}.mlp.down_proj": names[6:],
    }  # fmt: skip
    experts = [f"{block}.mlp.experts.gate_up_proj", f"{block}.mlp.experts.down_proj"]
    assert groups(experts) == {f"{block}.mlp.experts": experts}


def models() -> list[Any]:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    return [gpt2.eval(), MixtralForCausalLM(config).eval()]


@pytest.mark.parametrize("model", models(), ids=["Conv1D", "experts"])
def test_rounding_a_group_alone(model: nn.Module) -> None:
    """Only its weights change, by as much as its scheme rounds, and only while it lasts."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan = make_plan(model, HfQuantConfig("W4A16-g32"))
    layers = groups(plan.schemes)
    for group, names in layers.items():
        with rounded(model, names, W[4], method("rtn")):
            changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            assert changed == {n if n in before else f"{n}.weight" for n in names}, group
            for name in changed:
                after = dict(model.named_parameters())[name]
                assert 0.02 < (after - before[name]).norm() / before[name].norm() < 0.2
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    trials: list[Any] = []
    found = sensitivities(
        model, layers, [W[4], W[2]], method("rtn"),
        lambda m: sum((p - before[n]).norm().item() for n, p in m.named_parameters()),
        lambda each: trials.extend(each) or each,
    )  # fmt: skip
    assert len(trials) == 2 * len(layers) and all(0 < four < two for four, two in found.values())


@torch.no_grad()
def test_both_inputs_of_experts_are_rounded_once() -> None:
    """Two stacks share the layer's input; what the gate gives the second is rounded too."""
    model, ids, scheme = models()[1], torch.arange(16)[None], QuantScheme.parse("W8A8")
    experts, path = model.model.layers[0].mlp.experts, "model.layers.0.mlp.experts"
    first, second = f"{path}.gate_up_proj", f"{path}.down_proj"
    before = model(ids).logits
    with rounded(model, [first, second], scheme, method("rtn")):
        assert len(experts._forward_pre_hooks) == 1
        both = model(ids).logits
    with rounded(model, [first], scheme, method("rtn")):
        assert len(experts._forward_pre_hooks) == 1 and "_apply_gate" not in vars(experts)
    with rounded(model, [second], scheme, method("rtn")):
        given = experts._apply_gate(torch.randn(5, 64))
        assert not experts._forward_pre_hooks
        assert (given / given.abs().amax(-1, True) * 127 % 1).sub(0.5).abs().min() > 0.49, (
            "127 steps of a row's largest"
        )
        assert not torch.equal(model(ids).logits, both)
    assert "_apply_gate" not in vars(experts) and not experts._forward_pre_hooks
    assert torch.equal(model(ids).logits, before)


def quality(kl: float) -> Quality:
    made = {"kl": kl, "perplexity_ratio": 1 + kl, "top1": 1 - kl**0.5}
    metrics = {name: Estimate(value, value, value) for name, value in made.items()}
    return Quality("causal", 1, 1, "documents", 2, 2, "", "float32", "float32", metrics)


class Fake(Ladder):
    """Sixteen groups of a hundred weights; what they cost adds up to a third more than alone."""

    def _base(self) -> Rung:
        return Rung("base in bf16", None, 3200, 16.0, SimpleNamespace())  # type: ignore[arg-type]

    def _rung(self, name: str, config: HfQuantConfig) -> Rung:
        default = config.default_scheme.bits
        bits = [QuantScheme.parse(config.overrides.get(f"g{i}") or config.scheme).bits for i in range(16)]
        cost = 4 / 3 * sum(self.cost(i, b) for i, b in enumerate(bits))
        size = sum(100 * b // 8 for b in bits)
        got = quality(cost)
        assert name == MIXED or default == bits[0]
        return Rung(name, config, size, size / 200, SimpleNamespace(), got, self.limits.misses(size, got))  # type: ignore[arg-type]

    def _table(self, found: Walk, tried: Any) -> _Table:
        choices = [W[8], *tried]
        sizes = [[100 * s.bits // 8 for s in choices]] * 16
        costs = [[self.cost(i, s.bits) for s in choices] for i in range(16)]
        found.sensitivity = {f"g{i}": own[1:] for i, own in enumerate(costs)}
        return _Table({f"g{i}": [f"g{i}"] for i in range(16)}, choices, costs, frontier(sizes, costs), 0, {})

    @staticmethod
    def cost(i: int, bits: int) -> float:
        return (1 + i) * 1e-3 * 4.0 ** (4 - bits)


def walk(budget: Budget, max_size: int | None = None) -> Walk:
    job = SimpleNamespace(say=lambda _: None)
    return Fake(job, Limits(budget, max_size), list(W.values()), {}, None, None).walk()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "budget", [Budget(max_kl=0.3), Budget(max_ppl_increase=0.3), Budget(min_top1=0.5), Budget(max_kl=0.05)]
)
def test_the_mixed_plan_uses_the_budget_up(budget: Budget) -> None:
    found = walk(budget)
    sizes = [rung.bytes for rung in found.rungs if rung.name != MIXED]
    assert sizes == sorted(sizes, reverse=True)
    inside = [rung for rung in found.rungs if rung.config and rung.name != MIXED and not rung.misses]
    assert found.chosen is not None and found.chosen.name == MIXED and not found.chosen.misses
    assert found.chosen.bytes < min(rung.bytes for rung in inside)
    assert found.rungs[-1].name == MIXED and len(found.rungs) <= 1 + 4 + 4


def test_no_rung_and_every_rung() -> None:
    nothing = walk(Budget(max_kl=1e-9))
    assert nothing.chosen is None and [r.name for r in nothing.rungs[1:2]] == ["W8A16-g32"]
    everything = walk(Budget(max_kl=99))
    assert everything.chosen is not None and everything.chosen.name == "W2A16-g32"
    assert [r.name for r in everything.rungs] == ["base in bf16", *map(str, W.values())]


def test_the_best_inside_a_size() -> None:
    found = walk(Budget(), 700)
    assert found.chosen is not None and found.chosen.name == MIXED and found.chosen.bytes <= 700
    uniform = next(r for r in found.rungs if r.name == "W3A16-g32")
    assert found.chosen.kl < uniform.kl and "W2A16-g32" not in [r.name for r in found.rungs]
    assert walk(Budget(), 10).chosen is None


def test_nothing_is_mixed_where_the_first_rung_fits() -> None:
    found = walk(Budget(), 3000)
    assert found.chosen is not None and found.chosen is found.rungs[-1] and not found.sensitivity
    assert [r.name for r in found.rungs] == ["base in bf16", "W8A16-g32"]


def test_a_rung_that_is_measured_again_needs_room_for_that() -> None:
    """Twice the interval: the second number scatters as much as the first."""
    metrics = {"kl": Estimate(0.010, 0.009, 0.012), "perplexity_ratio": Estimate(1, 1, 1), "top1": Estimate(1, 1, 1)}
    got = replace(quality(0.0), metrics=metrics)
    assert not Limits(Budget(max_kl=0.0125)).misses(1, got) and not Limits(Budget(max_kl=0.015), margin=2).misses(
        1, got
    )
    assert Limits(Budget(max_kl=0.0125), margin=2).misses(1, got) == [
        "KL 0.01 (2 times the 95 % interval up to 0.014) is over the 0.0125 allowed, by 0.0015"
    ]


def test_speed_is_measured_with_as_many_tokens_as_the_model_has_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = _speed(models()[0])
    assert (speed.prompt, speed.new) == (16, 16), "of 32 positions"
    models()[0].save_pretrained(tmp_path)
    memory._main(str(tmp_path), {})
    assert json.loads(capsys.readouterr().out)["weight_bytes"] > 0


def test_halves_are_alike() -> None:
    text = "<|endoftext|>".join("word " * (10 + i) for i in range(40))
    one, two = halves(text)
    assert len(split(one)) == len(split(two)) == 20 and not set(split(one)) & set(split(two))
    assert len("".join(one)) == pytest.approx(len("".join(two)), rel=0.01)


def test_sensitivities_need_no_calibration_data() -> None:
    for name in ("gptq", "calibrated", "awq", "hadamard+gptq"):
        assert type(Decision.of(name, [QuantScheme(4)]).without_data()) is type(method("rtn"))
    assert type(Decision.of("hqq", [QuantScheme(4)]).without_data()) is type(method("hqq"))


def test_size_and_quality_together() -> None:
    found = walk(Budget(max_kl=0.3), 780)
    assert found.chosen is not None and found.chosen.bytes <= 780 and found.chosen.kl <= 0.3
    assert any("is over the 0.0 MB allowed" in miss for r in found.rungs for miss in r.misses)
    assert walk(Budget(max_kl=0.05), 700).chosen is None


def test_a_full_disk_is_told_with_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(charts, "available", lambda: None)
    monkeypatch.setattr(charts, "size_and_kl", lambda *_: b"picture")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskError, match=r"size_and_kl-light\.png"):
        _finish(tmp_path, {"sensitivity": {"kl": {}}}, {"folder": "x", "quality": None}, False, print)
    assert [file.name for file in tmp_path.iterdir()] == ["ladder.json"]
