"""One block of a model at a time: see its inputs, round its weights, and hand its new outputs to the next one.

`nn.Module` blocks come in from above, and batches of hidden states walk up through them; the model never exists whole.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.activations import Activations
from hf_quant.errors import HfQuantError
from hf_quant.memory import give_back_memory
from hf_quant.methods import method
from hf_quant.nn.experts import expert_input, stacks
from hf_quant.numerics import floored
from hf_quant.presets import Decision
from hf_quant.ranks import ALONE, Ranks
from hf_quant.scheme import QuantScheme
from hf_quant.stats import HELD_ROWS, SAMPLE_ROWS, InputStats
from hf_quant.tensor import QuantizedTensor
from hf_quant.transforms import Stage, weight_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
HELD = 8  # one in so many batches (of an expert's tokens, one in so many rows) is held out, to judge on
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


@dataclass(frozen=True)
class Stored:
    """A block's parameters as the checkpoint of the float model has them, by full name.

    Attributes:
        dtype: Tells what one is stored in, quantized or not.
        read: Reads one.
    """

    dtype: Callable[[str], torch.dtype]
    read: Callable[[str], Tensor]


@dataclass
class Block:
    """One decoder layer.

    Attributes:
        name: ``"model.layers.3"``.
        module: In memory while it is worked on.
        layers: Full name of each linear layer (or stack of experts) to quantize, to its scheme.
        call: What the block takes besides hidden states; the same for all batches.
        alone: What it takes beside those of one sequence.
        rows: Sequences that are run together; one at a time once memory ran out.
        stored: What its parameters are in the checkpoint; None where they are what the module holds.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, QuantScheme]
    call: Call
    alone: Call
    rows: int = 1 << 30
    stored: Stored | None = None

    def local(self, layer: str) -> str:
        """A layer's name inside the block."""
        return layer.removeprefix(f"{self.name}.")

    def stored_in(self, parameter: str) -> torch.dtype:
        """What a parameter, by its name inside the block, is stored in where it is not quantized."""
        name = f"{self.name}.{parameter}"
        return self.stored.dtype(name) if self.stored is not None else torch.float32

    def run(self, hidden: Tensor, module: nn.Module | None = None, again: Callable[[], None] | None = None) -> Tensor:
        """The block's output.

        Args:
            hidden: ``[B, T, d]``, as is the output.
            module: Stands in for the block's own; None for that.
            again: Called when memory ran out within the run and it starts anew, one sequence at a time: what hooks have
                gathered so far would otherwise be gathered twice.
        """
        while True:
            try:
                parts = hidden.split(self.rows) if self.rows < len(hidden) else [hidden]
                made = [self._run(part, module or self.module) for part in parts]
                return made[0] if len(made) == 1 else torch.cat(made)
            except RuntimeError as error:
                if not _out_of_memory(error) or min(self.rows, len(hidden)) == 1:
                    raise
                self.rows = 1
                if again is not None:
                    again()

    def sample(self, batch: Tensor, module: nn.Module | None = None) -> Tensor:
        """The output for the first sequence of a batch."""
        return self._run(batch[:1], module or self.module)

    def _run(self, hidden: Tensor, module: nn.Module) -> Tensor:
        args, kwargs = self.alone if len(hidden) == 1 else self.call
        out = module(hidden.to(next(module.parameters()).device), *args, **kwargs)
        return states_of(self.name, out)


def states_of(name: str, out: Any) -> Tensor:
    """The hidden states among what a block returns: all of it, or the first of several things.

    Raises:
        HfQuantError: There are none; names the block.
    """
    states = out[0] if isinstance(out, tuple | list) and out else out
    if not isinstance(states, Tensor):
        raise HfQuantError(
            f"{name}: returns {type(out).__name__}, and only hidden states [B, T, d] can be calibrated yet"
        )
    return states


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


@dataclass(frozen=True)
class _Group:
    """Layers that are given the same tensor, by local name; ``source`` is the module that made it."""

    layers: tuple[str, ...]
    source: str | None
    experts: bool = False


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
    groups = _groups(block, first)
    sample = {i: block.run(hidden[i]) for i in mine[:: -(-len(mine) // SAMPLE) or 1]} if twin is None else {}
    staged = recipe.decision.staged(block.layers.values())
    together = [] if staged else [group for group in groups if not group.experts]
    for part in [together] * bool(together) + [[group] for group in groups if group not in together]:
        if part[0].experts:
            _solve_experts(block, part[0], hidden, mine, recipe, made)
            continue
        drifts = recipe.decision.needs_twin(block.layers[f"{block.name}.{n}"] for group in part for n in group.layers)
        found = _collect(block, part, hidden, mine, recipe.ranks, twin if drifts else None, original)
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


def use(block: Block, codes: Mapping[str, QuantizedTensor]) -> None:
    """Let the block's layers compute with what their codes mean."""
    for name, quantized in codes.items():
        _put(block, name, quantized.dequantize(torch.float32))


def _put(block: Block, name: str, real: Tensor) -> None:
    local = block.local(name)
    path, _, leaf = local.rpartition(".")
    parent: Any = block.module.get_submodule(path)
    if leaf in stacks(parent):
        stack: Tensor = getattr(parent, leaf).data
        stack.copy_(real.transpose(-1, -2) if parent.is_transposed else real)
    else:
        weight_of(block.module.get_submodule(local)).copy_(real)


# -- what belongs together ----------------------------------------------------------------------------------------


def _groups(block: Block, batch: Tensor) -> list[_Group]:
    """The layers in the order they run, those that are given the same tensor together."""
    made_by: list[tuple[Tensor, str]] = []  # tensors are kept, so that no two have the same identity
    given: list[tuple[Tensor, list[str]]] = []
    experts: dict[str, list[str]] = {}
    for name in block.layers:
        path, _, leaf = block.local(name).rpartition(".")
        if leaf in stacks(block.module.get_submodule(path)):
            experts.setdefault(path, []).append(block.local(name))

    def before(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            names = next((names for tensor, names in given if tensor is args[0]), None)
            if names is None:
                given.append((args[0], names := []))
            if name not in names:
                names.append(name)

        return look

    def after(name: str) -> Callable[..., None]:
        return lambda _module, _args, out: made_by.append((out, name)) if isinstance(out, Tensor) else None

    linear = [local for n in block.layers if (local := block.local(n)).rpartition(".")[0] not in experts]
    handles = [block.module.get_submodule(n).register_forward_pre_hook(before(n)) for n in [*linear, *experts]]
    handles += [m.register_forward_hook(after(n)) for n, m in block.module.named_modules() if n]
    with _removed(handles):
        block.sample(batch)
    made = []
    for tensor, names in given:
        source = next((name for out, name in made_by if out is tensor), None)
        layers = tuple(name for name in names if name not in experts)
        made += [_Group(layers, source)] if layers else []
        made += [_Group(tuple(experts[name]), None, experts=True) for name in names if name in experts]
    missing = {*linear, *(n for names in experts.values() for n in names)} - {n for g in made for n in g.layers}
    if missing:
        raise HfQuantError(f"{block.name}.{min(missing)} saw no tokens")
    return made


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _SeenError(Exception):
    """Everything asked for was seen; the rest of the block need not run."""


def _inputs(block: Block, module: nn.Module, names: list[str], batch: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What the modules of those local names are called with; the block is left as soon as that is known."""
    found: dict[str, list[tuple[Tensor, ...]]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            found.setdefault(name, []).append((*args, *kwargs.values()))
            if len(found) == len(names) and block.rows >= batch.shape[0]:
                raise _SeenError

        return hook

    handles = [module.get_submodule(n).register_forward_pre_hook(look(n), with_kwargs=True) for n in names]
    with _removed(handles), suppress(_SeenError):
        block.run(batch, module, found.clear)
    return {name: tuple(torch.cat(parts) for parts in zip(*calls, strict=True)) for name, calls in found.items()}


def _collect(
    block: Block, part: list[_Group], hidden: Activations, mine: list[int], ranks: Ranks, twin: nn.Module | None,
    original: Activations | None,
) -> dict[str, InputStats]:  # fmt: skip
    """Statistics of each group's input, under the name of its first layer."""
    leaders = [group.layers[0] for group in part]
    stats = {}
    for name in leaders:
        weight = weight_of(block.module.get_submodule(name))
        stats[name] = InputStats.empty(weight.shape[1], weight.device, drift=twin is not None)
    judged = max(1, len(hidden) // HELD)
    rounds = {g.layers[0]: any(block.layers[f"{block.name}.{n}"].activations for n in g.layers) for g in part}
    for i in mine:
        seen = _inputs(block, block.module, leaders, hidden[i])
        there = {} if twin is None or original is None else _inputs(block, twin, leaders, original[i])
        held = i % HELD == HELD - 1 or (1 < len(hidden) < HELD and i == len(hidden) - 1)
        here, whole = hidden[i].shape[:2].numel(), hidden.states.shape[:2].numel()
        every = -(-judged * here // min(HELD_ROWS, -(-whole // HELD)))
        for name in leaders:
            other = there[name][0] if there else None
            few = -(-here * len(hidden) // SAMPLE_ROWS) if rounds[name] else 0
            stats[name].update(seen[name][0], other, held=every if held else 0, sampled=few)
    for name, each in stats.items():
        reduce(each, ranks)
        if not each.peak.isfinite().all():
            raise HfQuantError(f"{block.name}.{name}: NaN or infinite values among its inputs")
    return stats


def reduce(stats: InputStats, ranks: Ranks) -> None:
    """Join the statistics of all ranks, in place."""
    if ranks.world == 1:
        return
    ranks.sum_(stats.gram)
    if stats.drift is not None:
        ranks.sum_(stats.drift)
    device = stats.gram.device
    stats.peak = torch.stack(ranks.every(stats.peak, device)).amax(0)
    stats.sample = [x for part in ranks.every(stats.sample, device) for x in part]
    rows, drift_rows = ranks.total(stats.rows, stats.drift_rows)
    stats.rows, stats.drift_rows = int(rows), int(drift_rows)
    stats.held = [pair for held in ranks.every(stats.held, device) for pair in held]


# -- solving ------------------------------------------------------------------------------------------------------


def _solve_group(
    block: Block, group: _Group, stats: InputStats, first: Tensor, recipe: Recipe, made: Solved,
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
            _put(block, f"{block.name}.{local}", each.dequantize(torch.float32))
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
        _put(block, full[local], quantized.dequantize(torch.float32))


def _solve_experts(
    block: Block, group: _Group, hidden: Activations, mine: list[int], recipe: Recipe, made: Solved
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
                states, chosen, *_ = _inputs(block, block.module, [path], hidden[i])[path]
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
        _put(block, name, made.codes[name].dequantize(torch.float32))


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


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _check(block: Block, hidden: Activations, mine: list[int]) -> None:
    if not all(hidden[i].isfinite().all() for i in mine):
        raise HfQuantError(f"{block.name}: its outputs on the calibration text are NaN or infinite")
