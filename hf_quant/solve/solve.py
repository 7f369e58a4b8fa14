"""Quantizes one block at a time: collect its inputs, quantize its weights, and compute the inputs of the next block.

The caller passes `nn.Module` blocks one after the other, so the whole model is never in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.disk.memory import give_back_memory
from hf_quant.errors import HfQuantError
from hf_quant.methods import quantize
from hf_quant.solve.block import Block, put
from hf_quant.solve.experts import solve_experts
from hf_quant.solve.hidden_states import Batch, HiddenStates
from hf_quant.solve.inputs import Group, collect, groups_of
from hf_quant.solve.latent import offset_of
from hf_quant.solve.learning import learn
from hf_quant.solve.ranks import ALONE, Ranks
from hf_quant.solve.result import Recipe, Solved, with_range
from hf_quant.solve.unseen import round_unseen
from hf_quant.transforms import Stage

SAMPLE = 4  # batches for the error of a block, if the float model is not followed


@torch.no_grad()
def solve(block: Block, hidden: HiddenStates, recipe: Recipe, original: HiddenStates | None = None) -> Solved:
    """Quantize the layers of a block, leave it with dequantized weights, and replace ``hidden`` by its outputs.

    Args:
        block: In floating point.
        hidden: Its inputs.
        recipe: How to quantize.
        original: Its inputs in the float model, replaced by the outputs there; None if the recipe does not need them.

    Raises:
        HfQuantError: An output is NaN or infinite, or a layer receives no tokens; names the block or the layer.
    """
    twin = copy.deepcopy(block.module) if original is not None else None
    mine = [i for i in range(len(hidden)) if recipe.ranks.owner(i) == recipe.ranks.rank]
    sample = sample_of(block, hidden, mine) if twin is None else {}
    solved = choose(block, hidden, recipe, twin, original)
    _settle(block, twin, solved.codes)
    if twin is not None and original is not None:
        for i in mine:
            original.put(i, block.run(original.batch(i, block.name), twin))
        sample = {i: original[i] for i in mine}
        twin = None  # training needs its memory
        learn(block, hidden, original, recipe, solved)
    squared_error = squared_output = 0.0
    for i in mine:
        after = block.run(hidden.batch(i, block.name))
        if (before := sample.get(i)) is not None:
            squared_error += (after - before).double().square().sum().item()
            squared_output += before.double().square().sum().item()
        hidden.put(i, after)
    squared_error, squared_output = recipe.ranks.total(squared_error, squared_output)
    solved.error = squared_error / squared_output if squared_output else 0.0
    _check(block, hidden, mine)
    return solved


def sample_of(block: Block, hidden: HiddenStates, mine: list[int]) -> dict[int, Tensor]:
    """The outputs of the block for some batches, by their numbers."""
    return {i: block.run(hidden.batch(i, block.name)) for i in mine[:: -(-len(mine) // SAMPLE) or 1]}


def choose(
    block: Block, hidden: HiddenStates, recipe: Recipe, twin: nn.Module | None, original: HiddenStates | None
) -> Solved:
    """Quantize the layers of a block, and leave it with dequantized weights.

    Args:
        block: In floating point.
        hidden: Its inputs.
        recipe: How to quantize.
        twin: The float block; None if the recipe does not need it.
        original: The inputs of the twin; None if there is none.
    """
    solved, unseen = Solved(), hidden.held_out() if recipe.decision.learns else []
    numbers = [i for i in range(len(hidden)) if i not in unseen]
    mine = [i for i in numbers if recipe.ranks.owner(i) == recipe.ranks.rank]
    # each rank advances its own batches only; for the others, the first batch is still that of an earlier block
    first = recipe.ranks.shared(hidden.batch(0, block.name)._replace(carry=None) if recipe.ranks.first else None)
    groups = groups_of(block, first)
    round_unseen(block, groups, recipe, solved)
    staged = recipe.decision.staged(block.layers.values())
    together = [] if staged else [group for group in groups if not group.experts]
    for part in [together] * bool(together) + [[group] for group in groups if group not in together]:
        if part[0].experts:
            solve_experts(block, part[0], hidden, mine, recipe, solved)
            continue
        drifts = recipe.decision.drifts(block.layers[block.full(n)] for group in part for n in group.layers)
        stats = collect(block, part, hidden, numbers, recipe.ranks, twin if drifts else None, original)
        for group in part:
            _solve_group(block, group, stats.pop(group.layers[0]), first, recipe, solved, twin)
    return solved


@torch.no_grad()
def advance(block: Block, hidden: HiddenStates, ranks: Ranks = ALONE) -> None:
    """Replace ``hidden`` by the outputs of the block."""
    mine = [i for i in range(len(hidden)) if ranks.owner(i) == ranks.rank]
    for i in mine:
        hidden.put(i, block.run(hidden.batch(i, block.name)))
    _check(block, hidden, mine)


def _settle(block: Block, twin: nn.Module | None, codes: Mapping[str, QuantizedTensor]) -> None:
    """Continue with the stored values, since a resumed run reads the block and the float model from there."""
    if block.stored is None:
        return
    coded = {*codes, *(f"{name}.weight" for name in codes)}
    for name, parameter in block.module.named_parameters(prefix=block.name):
        if name not in coded:
            parameter.data.copy_(parameter.data.to(block.stored.dtype(name)))
    for name, parameter in twin.named_parameters(prefix=block.name) if twin is not None else ():
        parameter.data.copy_(block.stored.read(name))


def _solve_group(
    block: Block, group: Group, stats: InputStats, first: Batch, recipe: Recipe, solved: Solved,
    twin: nn.Module | None,
) -> None:  # fmt: skip
    full = {local: block.full(local) for local in group.layers}
    schemes = {local: block.layers[name] for local, name in full.items()}
    codes = {block.local(name): quantized_tensor for name, quantized_tensor in solved.codes.items()}
    ranks = recipe.ranks

    def probe(module: nn.Module) -> Tensor:
        """The same on every rank, since it decides how weights are changed."""
        return ranks.shared(block.sample(first, module) if ranks.first else None)

    before = dict(codes)
    give_back_memory()  # from the runs of the block
    stage = Stage(block.module, twin, schemes, stats, group.source, codes, probe)
    for name, transform, selected in recipe.decision.transforms(schemes):
        stage.layers = selected
        for changed in transform.apply(stage):
            solved.steps.setdefault(block.full(changed), []).append(name)
    stage.layers = schemes
    stats.drift = None  # only transforms need it, and it is as large as the Gram matrix
    for local, quantized_tensor in codes.items():
        if quantized_tensor is not before[local]:  # scales were folded into it
            solved.codes[block.full(local)] = quantized_tensor
            put(block, block.full(local), quantized_tensor.dequantize(torch.float32))
    solved.note(full[group.layers[0]], stage.notes)
    for number, local in enumerate(group.layers):
        owner, solution = recipe.ranks.owner(number), None
        if owner == recipe.ranks.rank:
            give_back_memory()  # from the layer before: a factorization takes the most
            weight = stage.weight(local)
            quantized = quantize(recipe.decision.solver(schemes[local]), weight, schemes[local], recipe.dtype, stats)
            error = stats.error(weight, quantized.dequantize(torch.float32))
            solution = with_range(quantized, stats.peak).cpu(), error, list(stats.notes)
            stats.notes.clear()
        quantized, solved.errors[full[local]], notes = recipe.ranks.shared(solution, owner)
        solved.codes[full[local]] = quantized
        if recipe.decision.learning(schemes[local]) is not None:
            solved.offsets[full[local]] = offset_of(stage.weight(local), quantized)
        solved.note(full[local], notes)
        put(block, full[local], quantized.dequantize(torch.float32))


def _check(block: Block, hidden: HiddenStates, mine: list[int]) -> None:
    if not all(hidden[i].isfinite().all() for i in mine):
        raise HfQuantError(f"{block.name}: its outputs on the calibration text are NaN or infinite")
