"""A model whose blocks form no chains, as one block that its inputs enter."""

from __future__ import annotations

from inspect import signature
from typing import Any

from hf_quant.errors import PlanError, UnchainedError
from hf_quant.hf.batch_inputs import arguments
from hf_quant.hf.blocks import NO_CALL, Around
from hf_quant.hf.plan import Plan
from hf_quant.solve.block import Block, Stored
from hf_quant.solve.hidden_parts import HiddenParts
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


def entering(model: Any, around: Around) -> HiddenStates:
    """What enters the model, with its other arguments for each batch: token ids ``[S, T]``, one sequence in a batch, or batches.

    Raises:
        PlanError: The batches have not what the model takes first.
    """
    first = next(iter(signature(model.forward).parameters)) if around.batches else "input_ids"
    if any(first not in batch for batch in around.batches):
        raise PlanError(f"calibration: the batches have no {first}, which {type(model).__name__} takes first; {NOTE}")
    batches = around.batches or [{"input_ids": ids} for ids in around.ids.split(1)]
    device = next(model.parameters()).device
    given = [arguments(model, {name: x.to(device) for name, x in batch.items()}) for batch in batches]
    calls = {WHOLE: [((), {n: x for n, x in one.items() if n != first} | {"return_dict": False}) for one in given]}
    if around.batches:
        return HiddenParts.of([one[first] for one in given], calls, {}, None)
    return HiddenStates(around.ids.to(device), 1, calls)
