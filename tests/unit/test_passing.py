"""Blocks of every manner of calling: what they are called with, and in what form they return."""

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_quant.errors import HfQuantError, UnchainedError
from hf_quant.hf.block_calls import Forms, Passing, alike, passed_through, stand_in
from hf_quant.hf.blocks import Around
from hf_quant.solve.block import Block
from hf_quant.solve.hidden_states import HiddenStates
from hf_quant.solve.ranks import ALONE
from hf_quant.solve.solve import advance


class Layer(nn.Module):
    """Doubles its input, and returns it as ``form`` says; ``bias`` and the pair carry the batch in axes of their own."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.lin = form, nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, bias: Tensor, pair: tuple[Tensor, Tensor], extra: Any = None) -> Any:
        batch, length, _ = hidden_states.shape
        assert bias.shape == (2 * batch, 1, length) and pair[0].shape == (3, batch, length)  # as ALiBi, as M-RoPE
        out = hidden_states + self.lin(hidden_states)
        return {
            "tensor": out,
            "tuple": (out, None),
            "list": [out],
            "more": (out, out + 1),
            "inside": (out, (out + 1,)),
            "none": None,
            "constant": (out, torch.ones(3)),
            "half": (out[:, ::2], None),
        }[self.form]


class Model(nn.Module):
    """``carry``: what later layers take from the first one, nothing, a constant, or something that depends on the tokens."""

    def __init__(self, form: str, carry: str = "", depends: bool = False, between: bool = False) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(9, 4), nn.ModuleList([Layer(form), Layer(form)])
        self.form, self.carry, self.depends, self.between = form, carry, depends, between
        self.config = SimpleNamespace()

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        states, (batch, length), extra = self.embedding(input_ids), input_ids.shape, None
        pair = torch.arange(length).expand(3, batch, length)
        for layer in self.layers:
            given = int(input_ids[0, 0]) if self.depends else extra
            out = layer(states, bias=torch.zeros(2 * batch, 1, length), pair=(pair, pair), extra=given)
            states = out if self.form == "tensor" else out[0]
            extra = out[1] if self.carry else None
            states = states + 1 if self.between else states
            assert states.shape == (batch, length, 4)
        return states


def around(model: Model, ids: Tensor) -> Around:
    made = Around(model, {f"layers.{i}": layer for i, layer in enumerate(model.layers)}, ids, ALONE)
    made.find_chains()
    return made


def embedded(model: Model, ids: Tensor) -> Any:
    with torch.inference_mode():
        made = around(model, ids)
        (states,), calls = made.enter(made.chains[0], [{}], [None])
        return states, calls


@pytest.mark.parametrize("sequences", [2, 3, 4])
@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "more"])
def test_every_form_of_block(form: str, sequences: int) -> None:
    torch.manual_seed(0)
    model, ids = Model(form), torch.randint(9, (sequences, 5))
    entered, calls = embedded(model, ids)
    torch.testing.assert_close(entered.states, model.embedding(ids))
    assert len(entered) > 1  # something is left to judge on
    block, batch = Block("layers.1", model.layers[1], {}, *calls["layers.1"]), entered.batch(0, "layers.1")
    with torch.inference_mode():
        expected = entered[0] + model.layers[1].lin(entered[0])  # type: ignore[operator]
        torch.testing.assert_close(block.run(batch), expected)
        torch.testing.assert_close(block.sample(batch), expected[:1])
        block.rows = 1  # as after memory ran out
        torch.testing.assert_close(block.run(batch), expected)
    assert "forward" not in model.layers[0].__dict__


def test_arguments_that_depend_on_the_tokens_are_kept_for_each_sequence() -> None:
    ids = torch.arange(8).view(4, 2)
    entered, _ = embedded(Model("tuple", depends=True), ids)
    assert len(entered) == 4
    assert [call[1]["extra"] for call in entered.calls["layers.1"]] == [0, 2, 4, 6]


def test_what_the_first_block_computes_is_passed_on_if_it_is_the_same_for_all_tokens() -> None:
    ids = torch.arange(8).view(4, 2)
    _, calls = embedded(Model("constant", carry="constant"), ids)
    assert torch.equal(calls["layers.1"][0][1]["extra"], torch.ones(3))


def test_what_a_block_takes_of_the_one_before_is_carried_on_for_each_sequence() -> None:
    """As the tokens that sparse attention chooses in one layer for the next ones."""
    ids = torch.arange(8).view(4, 2)
    model = Model("more", carry="tokens")
    with torch.inference_mode():
        entered, calls = embedded(model, ids)
        assert len(entered) == 4
        model.layers[0].lin.weight += 1  # as if it were quantized
        advance(Block("layers.0", model.layers[0], {}, *calls["layers.0"]), entered)
        given = [call[1]["extra"] for call in entered.calls["layers.1"]]
        for number, extra in enumerate(given):
            assert torch.equal(extra, entered[number] + 1)


def test_a_change_between_blocks_begins_a_chain_which_the_results_of_the_one_before_enter() -> None:
    ids = torch.arange(4).view(2, 2)
    model = Model("tensor", between=True)
    with torch.inference_mode():
        made = around(model, ids)
        assert made.chains == [["layers.0"], ["layers.1"]]
        computed = HiddenStates(torch.randn(2, 2, 4), 1)
        (states,), _ = made.enter(made.chains[1], [{"layers.0": computed}], [None])
    torch.testing.assert_close(states.states, computed.states + 1)


def test_what_cannot_be_calibrated_is_said() -> None:
    ids = torch.arange(8).view(4, 2)
    with pytest.raises(HfQuantError, match=r"layers\.1: takes more of the block before"):
        embedded(Model("inside", carry="tokens"), ids)
    with pytest.raises(HfQuantError, match=r"layers\.0: returns NoneType"):
        embedded(Model("none"), ids)
    with pytest.raises(UnchainedError, match=r"layers\.0: makes hidden states \[1, 1, 4\] of \[1, 2, 4\]"):
        embedded(Model("half"), ids)
    shared = Model("tensor")
    shared.layers[1] = shared.layers[0]
    with pytest.raises(HfQuantError, match=r"layers\.[01]: is run more than once"):
        embedded(shared, ids)


def test_a_forward_of_its_own_is_put_back() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = own = lambda x: x  # type: ignore[method-assign]
    with passed_through({"a": layer}, Passing(), Forms()) as what:
        assert torch.equal(layer(hidden_states=torch.ones(2, 4)), torch.ones(2, 4))
    assert layer.forward is own and list(what.steps) == ["a"]


class Kind(Enum):
    ONE, TWO = 1, 2


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 2), (1.0, 2.0), ("a", "b"), (1, 1.0), (True, False), (torch.float16, torch.float32), (Kind.ONE, Kind.TWO),
     (torch.zeros(2), torch.ones(2)), (torch.zeros(2), torch.zeros(3)), ((1, 2), (1, 3)), ([1], [1, 2]),
     ({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), (None, 0), (slice(1), slice(2)), (torch.Size([1]), torch.Size([2]))],
)  # fmt: skip
def test_what_differs_is_not_alike(one: Any, other: Any) -> None:
    assert not alike(one, other) and alike(one, one) and alike(other, other)


def test_equal_values_and_opaque_objects_are_alike() -> None:
    for make in (
        lambda: 1.5,
        lambda: "ab",
        lambda: (torch.ones(2), {"a": [1]}),
        lambda: SimpleNamespace(x=1),
        object.__new__,
    ):
        one, other = (make(nn.Identity) if make is object.__new__ else make() for _ in range(2))  # type: ignore[operator]
        assert alike(one, other)


def test_a_block_that_takes_another_stream_first_is_refused() -> None:
    """As the reversible layers of Reformer."""

    def forward(prev_attn_output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return prev_attn_output + hidden_states

    x = torch.ones(1, 2, 4)
    passing = stand_in("layers.0", forward, Passing(), Forms())
    with pytest.raises(HfQuantError, match=r"^layers\.0: takes prev_attn_output before its hidden states"):
        passing(prev_attn_output=x, hidden_states=x)


def test_a_model_that_needs_more_than_token_ids_is_refused() -> None:
    class Page(Model):
        def forward(self, input_ids: Tensor, use_cache: bool, bbox: Tensor | None = None) -> Tensor:
            raise ValueError("You have to specify bbox")

    with pytest.raises(HfQuantError, match=r"Page: does not run on token ids alone \(You have to specify bbox\)"):
        around(Page("tensor"), torch.zeros(2, 3, dtype=torch.long))
