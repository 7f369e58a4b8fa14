"""The inputs of the layers of a block: which layers share an input, and its statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.geometry import geometry_of, weight_of
from hf_quant.core.stats import HELD_ROWS, SAMPLE_ROWS, InputStats
from hf_quant.errors import HfQuantError
from hf_quant.nn.experts import stacks
from hf_quant.solve.block import Block
from hf_quant.solve.hidden_states import Batch, HiddenStates
from hf_quant.solve.ranks import Ranks

HELD = 8  # one in so many batches (for an expert: one in so many rows) is held out


@dataclass(frozen=True)
class Group:
    """Layers that share an input, by local name.

    Attributes:
        layers: The layers.
        source: The module whose output the input is, in every run; None if there is none.
        experts: Whether they are stacks of experts.
        repeated: Whether they run more than once on each token.
    """

    layers: tuple[str, ...]
    source: str | None
    experts: bool = False
    repeated: bool = False


def groups_of(block: Block, batch: Batch) -> list[Group]:
    """The layers in the order they run; those that share an input are one group, those that do not run are in none."""
    made_by: list[tuple[Tensor, str]] = []  # keeps tensors alive, so that no two have the same identity
    read: dict[str, list[Tensor]] = {}  # by each layer, in each of its runs
    experts: dict[str, list[str]] = {}
    for name in block.layers:
        path, _, leaf = block.local(name).rpartition(".")
        if leaf in stacks(block.module.get_submodule(path)):
            experts.setdefault(path, []).append(block.local(name))

    def before(name: str) -> Callable[..., None]:
        return lambda _module, args: read.setdefault(name, []).append(args[0])

    def after(name: str) -> Callable[..., None]:
        return lambda _module, _args, out: made_by.append((out, name)) if isinstance(out, Tensor) else None

    linear = [local for n in block.layers if (local := block.local(n)).rpartition(".")[0] not in experts]
    handles = [block.module.get_submodule(n).register_forward_pre_hook(before(n)) for n in [*linear, *experts]]
    handles += [m.register_forward_hook(after(n)) for n, m in block.module.named_modules() if n]
    with _removed(handles):
        block.sample(batch)
    sharing: dict[tuple[int, ...], list[str]] = {}
    for name, tensors in read.items():
        sharing.setdefault(tuple(map(id, tensors)), []).append(name)
    groups = []
    for names in sharing.values():
        tensors = read[names[0]]
        sources = {next((name for out, name in made_by if out is tensor), None) for tensor in tensors}
        layers = tuple(name for name in names if name not in experts)
        source = sources.pop() if len(sources) == 1 else None
        groups += [Group(layers, source, repeated=len(tensors) > 1)] if layers else []
        groups += [
            Group(tuple(experts[name]), None, experts=True, repeated=len(tensors) > 1)
            for name in names if name in experts
        ]  # fmt: skip
    return groups


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _SeenError(Exception):
    """Ends the run of a block early, when all inputs have been seen."""


def inputs_of(
    block: Block, module: nn.Module, names: list[str], batch: Batch, *, repeated: bool = False
) -> dict[str, tuple[Tensor, ...]]:
    """The arguments of modules in all their runs, by local name; the first one as rows ``[..., K]``.

    The block is not run any further than needed, which is to its end if one of them is ``repeated``.
    """
    by_module: dict[str, list[tuple[Tensor, ...]]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            first, *others = (*args, *kwargs.values())
            by_module.setdefault(name, []).append((geometry_of(module).rows(first), *others))
            if not repeated and len(by_module) == len(names) and block.rows >= batch.states.shape[0]:
                raise _SeenError

        return hook

    handles = [module.get_submodule(n).register_forward_pre_hook(look(n), with_kwargs=True) for n in names]
    with _removed(handles), suppress(_SeenError):
        block.run(batch, module, by_module.clear)
    return {name: tuple(map(_joined, zip(*calls, strict=True))) for name, calls in by_module.items()}


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """The same argument of several runs in one tensor; as rows, if its runs have not one shape."""
    if len({part.shape[1:] for part in parts}) > 1:
        parts = tuple(part.reshape(-1, part.shape[-1]) for part in parts)
    return torch.cat(parts)


def collect(
    block: Block, part: list[Group], hidden: HiddenStates, numbers: list[int], ranks: Ranks, twin: nn.Module | None,
    original: HiddenStates | None,
) -> dict[str, InputStats]:  # fmt: skip
    """Statistics of the input of each group in the batches ``numbers``, of all ranks, by the name of its first layer."""
    leaders = [group.layers[0] for group in part]
    stats = {}
    for name in leaders:
        weight = weight_of(block.module.get_submodule(name))
        stats[name] = InputStats.empty(weight.shape[1], weight.device, drift=twin is not None)
    judged, all_tokens = max(1, len(numbers) // HELD), sum(map(hidden.rows, numbers))
    rounds = {g.layers[0]: any(block.layers[block.full(n)].activations for n in g.layers) for g in part}
    look = partial(inputs_of, block, names=leaders, repeated=any(group.repeated for group in part))
    for place, i in enumerate(numbers):
        if ranks.owner(i) != ranks.rank:
            continue
        seen = look(block.module, batch=hidden.batch(i, block.name))
        original_inputs = {} if twin is None or original is None else look(twin, batch=original.batch(i, block.name))
        held = place % HELD == HELD - 1 or (1 < len(numbers) < HELD and place == len(numbers) - 1)
        tokens = hidden.rows(i)
        every = -(-judged * tokens // min(HELD_ROWS, -(-all_tokens // HELD)))
        for name in leaders:
            other = _following(original_inputs[name][0], seen[name][0]) if original_inputs else None
            few = -(-tokens * len(numbers) // SAMPLE_ROWS) if rounds[name] else 0
            stats[name].update(seen[name][0], other, held=every if held else 0, sampled=few)
    for name, stats_of_group in stats.items():
        reduce(stats_of_group, ranks)
        if not stats_of_group.peak.isfinite().all():
            raise HfQuantError(f"{block.full(name)}: NaN or infinite values among its inputs")
    return stats


def _following(original: Tensor, x: Tensor) -> Tensor:
    """The inputs in the float model; ``x`` itself, as if nothing had drifted, where that model has gone on with other tokens."""
    return original if original.shape == x.shape else x


def reduce(stats: InputStats, ranks: Ranks) -> None:
    """Combine the statistics of all ranks, in place."""
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
