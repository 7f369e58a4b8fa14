"""The solver of one block, on blocks without transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_quant.core.scheme import QuantScheme
from hf_quant.data.held_windows import held_from_learning
from hf_quant.solve.block import Block
from hf_quant.solve.hidden_states import HiddenStates
from hf_quant.solve.inputs import collect, groups_of
from hf_quant.solve.ranks import ALONE
from hf_quant.solve.recipes import Decision
from hf_quant.solve.result import Recipe
from hf_quant.solve.solve import choose, solve

NOTHING: Any = ((), {})


class Mlp(nn.Module):
    """Runs out of memory in the middle, after its first layer was called, where more than ``most`` sequences come."""

    def __init__(self, most: int = 1 << 30, width: int = 32) -> None:
        super().__init__()
        self.most, self.norm = most, nn.RMSNorm(width)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(self.norm(x))
        if len(x) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return x + self.down_proj(up.relu())  # type: ignore[no-any-return]


def block_of(module: nn.Module, bits: int = 4) -> Block:
    module.requires_grad_(False)
    layers = {f"b.{n}": QuantScheme(bits, 32) for n in ("up_proj", "down_proj")}
    return Block("b", module, layers, NOTHING, NOTHING)


def recipe(name: str, scheme: QuantScheme) -> Recipe:
    return Recipe(Decision.of(name, [scheme]), torch.float32)


@pytest.mark.parametrize("twin", [True, False])
def test_memory_that_runs_out_within_a_block_counts_no_row_twice(twin: bool) -> None:
    torch.manual_seed(0)
    states = torch.randn(4, 8, 32)
    found = []
    for most in (1 << 30, 1):
        torch.manual_seed(1)
        block, hidden = block_of(Mlp(most)), HiddenStates(states.clone(), 2)
        with torch.inference_mode():
            groups = groups_of(block, hidden.batch(0, block.name))
            float_block = Mlp(most).requires_grad_(False) if twin else None
            found.append(collect(block, groups, hidden, [0, 1], ALONE, float_block, hidden if twin else None))
        assert block.rows == (1 if most == 1 else 1 << 30)
    for name, stats in found[0].items():
        assert stats.seen == found[1][name].seen == 32 and stats.drift_rows == found[1][name].drift_rows
        torch.testing.assert_close(stats.gram, found[1][name].gram)


@pytest.mark.parametrize(
    ("name", "sequences", "size"),
    [("calibrated", n, size) for n, size in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2))]
    + [("gptq", 2, 2), ("drift+rtn", 2, 2)],
)
def test_few_sequences(name: str, sequences: int, size: int) -> None:
    """Also fewer rows than columns: the result is finite, and no further from the float block than rounding by much."""
    torch.manual_seed(0)
    states, scheme = torch.randn(sequences, 6, 32), QuantScheme(4, 32)
    errors = {}
    for each in (name, "rtn"):
        torch.manual_seed(1)
        block, hidden = block_of(Mlp()), HiddenStates(states.clone(), size)
        chosen = recipe(each, scheme)
        solved = solve(
            block, hidden, chosen, HiddenStates(states.clone(), size) if chosen.decision.needs_twin([scheme]) else None
        )
        assert hidden.states.isfinite().all() and solved.codes.keys() == block.layers.keys()
        errors[each] = solved.error
        assert all(0 < error < 1 for error in solved.errors.values())
    assert errors[name] < 1.5 * errors["rtn"]


@pytest.mark.parametrize(("name", "unseen"), [("learned", True), ("calibrated", False)])
def test_what_learning_is_judged_on_is_in_no_statistics(name: str, unseen: bool) -> None:
    """Else the codes that learning starts from would have seen it already, and would be kept for that."""
    torch.manual_seed(0)
    states, scheme, chosen = torch.randn(32, 8, 32), QuantScheme(4, 32), []
    other = HiddenStates(states, 2)
    for number in other.held_out():
        other = HiddenStates(other.states.clone(), 2)
        other.put(number, torch.randn(2, 8, 32) * 3)
    for hidden in (HiddenStates(states.clone(), 2), other):
        torch.manual_seed(1)
        block = block_of(Mlp())
        with torch.no_grad():
            solved = choose(block, hidden, recipe(name, scheme), Mlp().requires_grad_(False), hidden)
        chosen.append({layer: codes.codes().tolist() for layer, codes in solved.codes.items()})
    assert other.held_out() == [7, 15] and (chosen[0] == chosen[1]) == unseen


@pytest.mark.parametrize(("sequences", "size"), [(2, 1), (3, 1), (4, 2), (16, 2), (32, 2), (32, 1), (33, 1)])
def test_every_step_holds_out_the_same_windows(sequences: int, size: int) -> None:
    """Those of the blocks, and those of the training of scales end to end."""
    held = HiddenStates(torch.empty(sequences, 1, 1), size).held_out()
    windows = held_from_learning(sequences).nonzero().flatten().tolist()
    assert windows == [s for number in held for s in range(number * size, number * size + size)]
    assert 0 < len(windows) < sequences


class Experts(nn.Module):
    """As transformers stacks them; every token goes to the first of four experts, the rest see nothing."""

    num_experts, has_gate, has_bias, is_transposed = 4, False, False, False

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = (
            nn.Parameter(torch.randn(4, 64, 64) / 8),
            nn.Parameter(torch.randn(4, 64, 64) / 8),
        )
        self.act_fn = nn.ReLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.act_fn(hidden_states @ self.up_proj[0].T) @ self.down_proj[0].T  # type: ignore[no-any-return]


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = torch.zeros(len(tokens), 1, dtype=torch.int64)
        return x + self.experts(tokens, chosen, chosen + 1.0).view_as(x)  # type: ignore[no-any-return]


def test_experts_that_see_nothing_do_not_count_as_perfect() -> None:
    torch.manual_seed(0)
    module = Mixture().requires_grad_(False)
    scheme = QuantScheme(3, 32)
    layers = {f"b.experts.{n}": scheme for n in ("up_proj", "down_proj")}
    solved = solve(
        Block("b", module, layers, NOTHING, NOTHING), HiddenStates(torch.randn(8, 32, 64), 2), recipe("gptq", scheme)
    )
    assert solved.experts["b.experts.up_proj"] == [256, 0, 0, 0]
    for name in layers:
        assert solved.errors[name] > 0.02  # three of four are rounded to three bits, which costs 3 % and more
