"""What a method means for the layers of one model, and what the recipe says of it."""

import pytest

from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.errors import PlanError
from hf_quant.solve.recipes import PRESETS, Decision, preset

W8, W4, W3, INT8 = (QuantScheme.parse(slug) for slug in ("W8A16-g32", "W4A16-g32", "W3A16-g32", "W8A8"))


def decided(method: str, **layers: QuantScheme) -> dict[str, list[str]]:
    decision = Decision.of(method, layers.values())
    return {name: list(own) for name, _, own in decision.transforms(layers)}


def test_each_layer_gets_what_its_own_scheme_asks_for() -> None:
    assert decided("calibrated", q=W4, k=W4) == {"awq": ["q", "k"], "drift": ["q", "k"]}
    assert decided("calibrated", q=W8, k=W8) == {"awq": ["q", "k"]}
    assert decided("calibrated", q=INT8, k=INT8) == {"smoothquant": ["q", "k"]}
    assert decided("calibrated", q=W4, k=W3) == {"awq": ["q", "k"], "drift": ["q", "k"]}
    assert decided("smoothquant+awq+gptq", q=W8, k=INT8) == {"smoothquant": ["q", "k"], "awq": ["q", "k"]}
    assert decided("drift+gptq", q=W8, k=INT8) == {"drift": ["q", "k"]}


def test_shared_columns_are_scaled_once_and_for_all_layers() -> None:
    assert decided("calibrated", q=W8, k=W4) == {"awq": ["q", "k"], "drift": ["k"]}
    for layers in ({"q": W4, "k": INT8}, {"q": INT8, "k": W4}):
        made = decided("calibrated", **layers)
        assert set(made) == {"smoothquant", "drift"} and made["smoothquant"] == ["q", "k"]
        assert made["drift"] == [name for name, scheme in layers.items() if scheme is W4]


def test_the_decision_is_for_the_schemes_of_the_plan() -> None:
    decision = Decision.of("calibrated", [W8, W4])
    assert decision.calibrated and decision.needs_twin([W4]) and not decision.needs_twin([W8])
    assert decision.staged([W8, W4]) and not Decision.of("gptq", [W8]).staged([W8])
    assert vars(decision.solver(W4))["sweeps"] == 2 and type(decision.solver(W8)).__name__ == "RTN"
    assert not Decision.of("rtn", [W8, W4]).calibrated and Decision.of("gptq", [W8]).calibrated


def test_the_recipe_says_what_was_done_and_to_how_many_layers() -> None:
    layers = {"a.q": W8, "a.k": W4, "a.up": W4, "a.down": W4}
    decision = Decision.of("calibrated", layers.values())
    done = {"a.q": ["awq"], "a.k": ["awq", "drift"], "a.up": ["drift"]}
    steps = {kind: [(s["name"], s["layers"]) for s in each] for kind, each in decision.steps(layers, done).items()}
    assert steps == {"4 bits": [("awq", 1), ("drift", 2), ("gptq", 3)], "8 bits": [("awq", 1), ("rtn", 1)]}
    assert decision.skipped(layers, done) == {}
    assert decision.skipped(layers, done | {"a.k": ["drift"]}) == {"4 bits": ["awq"]}
    only = Decision.of("rtn", [W4]).steps({"a.k": W4}, {})
    assert only == {"4 bits": [{"name": "rtn", "steps": 20, "least": 0.6, "layers": 1}]}


@pytest.mark.parametrize("bits", BITS)
def test_presets_and_chains(bits: int) -> None:
    scheme = QuantScheme(bits)
    assert all(preset(name, scheme).calibrated for name in PRESETS)
    chain = preset("hadamard+awq+drift+hqq", scheme)
    assert chain.calibrated and (chain.transforms, chain.method) == (("hadamard", "awq", "drift"), "hqq")
    assert [preset(name, scheme).calibrated for name in ("rtn", "hqq", "gptq")] == [False, False, True]


@pytest.mark.parametrize(("wrong", "named"), [("gptq+awq", "awq"), ("magic", "magic"), ("magic+rtn", "magic")])
def test_unknown_steps_are_named(wrong: str, named: str) -> None:
    with pytest.raises(PlanError, match=f"no '({named}|gptq)'"):
        preset(wrong, QuantScheme(4))
