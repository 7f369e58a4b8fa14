"""One block of a model at a time: see its inputs, round its weights, and hand its new outputs to the next one.

`nn.Module` blocks come in from above, and batches of hidden states walk up through them; the model never exists whole.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.numerics import floored
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.disk.memory import give_back_memory
from hf_quant.errors import HfQuantError
from hf_quant.methods import method
from hf_quant.nn.experts import expert_input, stacks
from hf_quant.solve.block import Block, put
from hf_quant.solve.hidden_states import Activations
from hf_quant.solve.inputs import HELD, Group, collect, groups_of, inputs_of, reduce
from hf_quant.solve.ranks import ALONE, Ranks
from hf_quant.solve.recipes import Decision
from hf_quant.transforms import Stage

EXPERT_HELD = 256  # rows of one expert that are held out at most
STARVED = 32  # an expert that saw fewer tokens is rounded without them
SAMPLE = 4  # batches that a block's error is measured on, where the float model is not followed
EXPERTS = 1 << 30  # bytes of statistics of experts collected together; more experts take more passes


@dataclass(frozen=True)
class Recipe:
    """How the weights of a block become codes.

    Attributes:
        decision: For each scheme, what is done to the weights, stage by stage, and how codes are chosen.
        dtype: What scales are stored in.
        ranks: Who works on it.
    """

    decision: Decision
    dtype: torch.dtype
    ranks: Ranks = ALONE


@dataclass
class Solved:
    """What became of one block.

    Attributes:
        codes: Full name of each layer to its codes.
        errors: To the squared error of the layer's output over its squared output, on what it was asked to give.
        steps: Full name of each layer to the transforms that changed it, in order.
        notes: Of layers, stages and experts: what is worth reporting.
        error: Of the block's output likewise, all its layers quantized: beside the float block on the same inputs or,
            where the float model's activations are followed, beside those.
        experts: Full name of each stack to the tokens that each of its experts saw.
        starved: Full name of each stack to those experts that saw too few, and were rounded without them.
    """

    codes: dict[str, QuantizedTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    steps: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    error: float = 0.0
    experts: dict[str, list[int]] = field(default_factory=dict)
    starved: dict[str, list[int]] = field(default_factory=dict)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise of the block's output; None where there is no noise."""
        return -10 * math.log10(self.error) if self.error else None

    def record(self, block: str) -> dict[str, Any]:
        """For journal and recipe."""
        return {
            "block": block, "error": self.error, "sqnr_db": self.sqnr_db, "layers": self.errors, "steps": self.steps,
            "notes": self.notes, "experts": self.experts, "starved": self.starved,
        }  # fmt: skip

    def note(self, name: str, lines: Iterable[str]) -> None:
        """Remember ``lines`` about a layer."""
        new = [line for line in lines if line not in self.notes.get(name, [])]
        if new:
            self.notes.setdefault(name, []).extend(new)


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
            _solve_experts(block, part[0], hidden, mine, recipe, made)
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


def _solve_experts(
    block: Block, group: Group, hidden: Activations, mine: list[int], recipe: Recipe, made: Solved
) -> None:
    """Each expert on the tokens that are sent to it; the projections into the experts first."""
    path = group.layers[0].rpartition(".")[0]
    module: Any = block.module.get_submodule(path)
    shapes = stacks(module)
    for local in sorted(group.layers, key=lambda name: list(shapes).index(name.rpartition(".")[2])):
        name, stack = f"{block.name}.{local}", local.rpartition(".")[2]
        count, _, k = shapes[stack]
        step, parts, lost = max(1, EXPERTS // (8 * k * k)), [], []
        made.experts[name] = []
        for start in range(0, count, step):
            some = range(start, min(start + step, count))
            stats = {e: InputStats.empty(k, getattr(module, stack).device) for e in some}
            for i in mine:
                states, chosen, *_ = inputs_of(block, block.module, [path], hidden[i])[path]
                for e in some:
                    given = expert_input(module, stack, e, states.reshape(-1, states.shape[-1]), chosen)
                    stats[e].update(given, held=HELD if stats[e].seen < HELD * EXPERT_HELD else 0)
            for e in some:
                reduce(stats[e], recipe.ranks)
                owner, found = recipe.ranks.owner(e), None
                if owner == recipe.ranks.rank:
                    found = _solve_expert(module, stack, e, block.layers[name], stats[e], recipe)
                quantized, error, notes = recipe.ranks.shared(found, owner)
                parts.append(quantized)
                lost.append(error)
                made.experts[name].append(stats[e].seen)
                made.note(name, notes)
        made.codes[name] = QuantizedTensor.stack(parts)
        if block.layers[name].activations == "tensor":  # an expert that saw little knows little of its range
            widest = torch.stack([part.input_scale for part in parts if part.input_scale is not None]).amax()
            made.codes[name] = replace(made.codes[name], input_scale=widest.expand(count, 1).contiguous())
        if few := [e for e, seen in enumerate(made.experts[name]) if seen < STARVED]:
            made.starved[name] = few
        made.errors[name] = sum(lost) / len(lost)
        put(block, name, made.codes[name].dequantize(torch.float32))


def _solve_expert(
    module: Any, stack: str, expert: int, scheme: QuantScheme, stats: InputStats, recipe: Recipe
) -> tuple[QuantizedTensor, float, list[str]]:
    dense: Tensor = getattr(module, stack)[expert]
    weight = (dense.T if module.is_transposed else dense).contiguous()
    if stats.seen < STARVED:
        quantized = method("rtn").quantize(weight, scheme, recipe.dtype)
        notes = [f"expert {expert} saw {stats.seen} tokens: rounded to nearest"]
    else:
        quantized = recipe.decision.solver(scheme).quantize(weight, scheme, recipe.dtype, stats)
        notes = [f"expert {expert}: {note}" for note in stats.notes]
    quantized = with_range(quantized, stats.peak)
    return quantized.cpu(), stats.error(weight, quantized.dequantize(torch.float32)), notes


def with_range(quantized: QuantizedTensor, peak: Tensor) -> QuantizedTensor:
    """The same with one scale for all activations, where its scheme wants that: the largest value seen becomes 127.

    Args:
        quantized: A layer.
        peak: ``[K]``, the largest magnitude of each of its inputs.
    """
    if quantized.scheme.activations != "tensor":
        return quantized
    if quantized.scheme.outlier_columns and quantized.outliers is not None:
        peak = peak.index_fill(0, quantized.outliers.index.long(), 0)
    return replace(
        quantized, input_scale=floored(peak.amax()[None] / 127, quantized.scale.dtype).to(quantized.scale.dtype)
    )


def _check(block: Block, hidden: Activations, mine: list[int]) -> None:
    if not all(hidden[i].isfinite().all() for i in mine):
        raise HfQuantError(f"{block.name}: its outputs on the calibration text are NaN or infinite")
