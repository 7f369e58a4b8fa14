"""A model whose blocks form no chains, as one block that token ids enter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_quant.errors import PlanError, UnchainedError
from hf_quant.hf.blocks import NO_CALL, arguments
from hf_quant.hf.plan import Plan
from hf_quant.solve.block import Block, Stored
from hf_quant.solve.hidden_states import HiddenStates
from hf_quant.solve.ranks import Ranks

WHOLE = ""  # name of the block
NOTE = "the model is calibrated as one block, with all of it in memory"


def refuse_whole(plan: Plan, ranks: Ranks, reason: UnchainedError) -> None:
    """Refuse what needs blocks.

    Raises:
        PlanError: A method that trains block by block, or several processes; ``reason`` says why there are no blocks.
    """
    if any(plan.decision.learning(scheme) for scheme in plan.schemes.values()):
        raise PlanError(f"{reason}, and {plan.decision.method} trains block by block; calibrated works")
    if ranks.world > 1:
        raise PlanError(f"{reason}, and such a model is calibrated by one process, not {ranks.world}")


def whole(model: Any, plan: Plan, stored: Stored) -> Block:
    """The model as a block."""
    return Block(WHOLE, model, plan.schemes, NO_CALL, NO_CALL, stored=stored)


def tokens_of(model: Any, ids: Tensor) -> HiddenStates:
    """Token ids ``[S, T]``, one sequence in a batch, with the other arguments of the model for each."""
    calls = []
    for one in ids.split(1):
        kwargs = arguments(model, one) | {"return_dict": False}
        calls.append(((), {name: value for name, value in kwargs.items() if name != "input_ids"}))
    return HiddenStates(ids, 1, {WHOLE: calls})
