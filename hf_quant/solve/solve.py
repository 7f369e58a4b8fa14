"""One block of a model at a time: see its inputs, round its weights, and hand its new outputs to the next one.

`nn.Module` blocks come in from above, and batches of hidden states walk up through them; the model never exists whole.
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
from hf_quant.solve.block import Block, put
from hf_quant.solve.experts import solve_experts
from hf_quant.solve.hidden_states import Activations
from hf_quant.solve.inputs import Group, collect, groups_of
from hf_quant.solve.ranks import ALONE, Ranks
from hf_quant.solve.result import Recipe, Solved, with_range
from hf_quant.transforms import Stage

SAMPLE = 4  # batches that a block's error is measured on, where the float model is not followed


@torch.inference_mode()
def solve(block: Block, hidden: Activations, recipe: Recipe, original: Activations | None = None) -> Solved:
    """Quantize a block's layers, leave it computing with the result, and replace ``hidden`` by its outputs.

    Args:
        block: In floating point.
        hidden: Its inputs.
        recipe: How.
        original: Its inputs in the float model, replaced by its outputs there; None if the recipe does not need them.

    Raises:
        HfQuantError: An output is NaN or infinite, or a layer sees no tokens; names the block or the layer.
    """
    twin = copy.deepcopy(block.module) if original is not None else None
    made, mine = Solved(), [i for i in range(len(hidden)) if recipe.ranks.owner(i) == recipe.ranks.rank]
    # each rank moves its own batches up: on the others, the first one is still that of an earlier block
    first = recipe.ranks.shared(hidden[0] if recipe.ranks.first else None)
    groups = groups_of(block, first)
    sample = {i: block.run(hidden[i]) for i in mine[:: -(-len(mine) // SAMPLE) or 1]} if twin is None else {}
    staged = recipe.decision.staged(block.layers.values())
    together = [] if staged else [group for group in groups if not group.experts]
    for part in [together] * bool(together) + [[group] for group in groups if group not in together]:
        if part[0].experts:
            solve_experts(block, part[0], hidden, mine, recipe, made)
            continue
        drifts = recipe.decision.needs_twin(block.layers[f"{block.name}.{n}"] for group in part for n in group.layers)
        found = collect(block, part, hidden, mine, recipe.ranks, twin if drifts else None, original)
        for group in part:
            _solve_group(block, group, found.pop(group.layers[0]), first, recipe, made, twin)
    _settle(block, twin, made.codes)
    lost = whole = 0.0
    for i in mine:
        after = block.run(hidden[i])
        before = sample.get(i)
        if twin is not None and original is not None:
            before = block.run(original[i], twin)
            original.put(i, before)
        if before is not None:
            lost += (after - before).double().square().sum().item()
            whole += before.double().square().sum().item()
        hidden.put(i, after)
    lost, whole = recipe.ranks.total(lost, whole)
    made.error = lost / whole if whole else 0.0
    _check(block, hidden, mine)
    return made


@torch.inference_mode()
def advance(block: Block, hidden: Activations, ranks: Ranks = ALONE) -> None:
    """Replace ``hidden`` by the block's outputs."""
    mine = [i for i in range(len(hidden)) if ranks.owner(i) == ranks.rank]
    for i in mine:
        hidden.put(i, block.run(hidden[i]))
    _check(block, hidden, mine)


def _settle(block: Block, twin: nn.Module | None, codes: Mapping[str, QuantizedTensor]) -> None:
    """Go on with what is stored: a run that was interrupted reads the block and the float model from there."""
    if block.stored is None:
        return
    coded = {*codes, *(f"{name}.weight" for name in codes)}
    for name, parameter in block.module.named_parameters(prefix=block.name):
        if name not in coded:
            parameter.data.copy_(parameter.data.to(block.stored.dtype(name)))
    for name, parameter in twin.named_parameters(prefix=block.name) if twin is not None else ():
        parameter.data.copy_(block.stored.read(name))


def _solve_group(
    block: Block, group: Group, stats: InputStats, first: Tensor, recipe: Recipe, made: Solved,
    twin: nn.Module | None,
) -> None:  # fmt: skip
    full = {local: f"{block.name}.{local}" for local in group.layers}
    schemes = {local: block.layers[name] for local, name in full.items()}
    codes = {block.local(name): each for name, each in made.codes.items()}
    ranks = recipe.ranks

    def probe(module: nn.Module) -> Tensor:
        """The same on every rank: it decides what is done to the weights."""
        return ranks.shared(block.sample(first, module) if ranks.first else None)

    before = dict(codes)
    stage = Stage(block.module, twin, schemes, stats, group.source, codes, probe)
    for name, transform, own in recipe.decision.transforms(schemes):
        stage.layers = own
        for changed in transform.apply(stage):
            made.steps.setdefault(f"{block.name}.{changed}", []).append(name)
    stage.layers = schemes
    for local, each in codes.items():
        if each is not before[local]:  # scales went into it
            made.codes[f"{block.name}.{local}"] = each
            put(block, f"{block.name}.{local}", each.dequantize(torch.float32))
    made.note(full[group.layers[0]], stage.notes)
    for number, local in enumerate(group.layers):
        owner, found = recipe.ranks.owner(number), None
        if owner == recipe.ranks.rank:
            give_back_memory()  # of the layer before: a factorization takes the most
            weight = stage.weight(local)
            quantized = recipe.decision.solver(schemes[local]).quantize(weight, schemes[local], recipe.dtype, stats)
            error = stats.error(weight, quantized.dequantize(torch.float32))
            found = with_range(quantized, stats.peak).cpu(), error, list(stats.notes)
            stats.notes.clear()
        quantized, made.errors[full[local]], notes = recipe.ranks.shared(found, owner)
        made.codes[full[local]] = quantized
        made.note(full[local], notes)
        put(block, full[local], quantized.dequantize(torch.float32))


def _check(block: Block, hidden: Activations, mine: list[int]) -> None:
    if not all(hidden[i].isfinite().all() for i in mine):
        raise HfQuantError(f"{block.name}: its outputs on the calibration text are NaN or infinite")
