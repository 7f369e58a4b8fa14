"""Learns the codes and scales of a block's layers together, so that the block gives what the float model's block gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.activations import rounded
from hf_quant.core.geometry import geometry_of
from hf_quant.core.numerics import relative_error
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.disk.memory import give_back_memory
from hf_quant.errors import HfQuantError
from hf_quant.solve.block import Block, parameter_of, put, use
from hf_quant.solve.hidden_states import Batch, HiddenStates
from hf_quant.solve.latent import Latent
from hf_quant.solve.recipes import LEARNED, Learning
from hf_quant.solve.result import Recipe, Solved

WARM = 10  # steps until the learning rate is what it should be
LAST = 0.05  # of the learning rate is left in the end
LONG = 512  # tokens of a sequence from which on a processor is as fast with one as with two
WORTH = 1 << 26  # bytes
PATIENCE = 3  # steps in a row without a finite loss


def learn(block: Block, hidden: HiddenStates, wanted: HiddenStates, recipe: Recipe, solved: Solved) -> None:
    """Lower the error of the block's output, and put the codes that do it into ``solved`` and into the block.

    Some batches are held out, which the statistics that the start was calibrated on have not seen either
    (`HiddenStates.held_out`). After every pass over the others the error on them is measured, and the codes with the least are
    kept: those that learning starts from, if no pass lowers it.

    Args:
        block: Computes with the codes of ``solved``.
        hidden: Its inputs, ``[S, T, d]``.
        wanted: What the float model's block gives, likewise.
        recipe: How.
        solved: The result of the block so far, which is changed.

    Raises:
        HfQuantError: The loss is not finite, again and again; names the block.
    """
    learning = next(filter(None, map(recipe.decision.learning, block.layers.values())), None)
    if learning is None:
        return
    names = [name for name, scheme in block.layers.items() if recipe.decision.learning(scheme) is not None]
    latents = {name: Latent(solved.codes[name], solved.offsets.pop(name)) for name in names}
    held = hidden.held_out() or list(range(len(hidden)))
    train = [i for i in range(len(hidden)) if i not in held] or held
    with _rounded_inputs(block, solved.codes):
        first = least = _loss(block, hidden, wanted, held, recipe)
        best = {name: solved.codes[name] for name in names}
        passes = _passes(block, hidden, wanted, train, latents, learning, recipe)
        for _ in passes:
            lost = _loss(block, hidden, wanted, held, recipe)
            if lost < least:
                least, best = lost, {name: latent.quantized() for name, latent in latents.items()}
    use(block, best)
    moved = sum(int((best[name].codes() != solved.codes[name].codes()).sum()) for name in names)
    share = moved / sum(latent.place.numel() for latent in latents.values())
    solved.note(
        block.name,
        [f"{LEARNED}: error of held-out outputs {first:.3g} to {least:.3g}, {share:.2%} of the codes changed"],
    )
    if least < first:
        solved.codes |= best
        for name in names:
            solved.steps.setdefault(name, []).append(LEARNED)
            solved.errors.pop(name, None)  # it was that of other codes


@torch.enable_grad()
def _passes(
    block: Block, hidden: HiddenStates, wanted: HiddenStates, train: list[int], latents: dict[str, Latent],
    learning: Learning, recipe: Recipe,
) -> Iterator[None]:  # fmt: skip
    """Learn, and stop after every pass for a look at the result, which is in the block.

    The first third of the passes leaves the codes as they are: there are few scales, so that little text tells what they
    should be, and where there is too little for the codes, what it has found is kept. Then both are learned, each with a warmup
    and cosine of its own, scales half as fast. A step follows every batch, whoever holds it, so that the processes take turns: with
    two batches in a step it takes a third more passes to the same error.
    """
    optimizer = torch.optim.Adam(
        [{"params": [getattr(latent, name) for latent in latents.values()]} for name in ("place", "factor")],
        betas=(0.9, 0.95),
        fused=True,  # needs no memory beside its moments
    )
    draw, failed = torch.Generator().manual_seed(learning.seed), 0
    first = learning.epochs // 3
    for epoch in range(learning.epochs):
        alone = epoch < first
        rates = (0.0, learning.scales) if alone else learning.together
        steps, step = (
            passes * len(train) for passes in ((first, epoch) if alone else (learning.epochs - first, epoch - first))
        )
        for number in torch.randperm(len(train), generator=draw).tolist():
            with _only_these_learn(block, latents):
                loss = _step(block, hidden, wanted, train[number], latents, recipe)
            failed = 0 if math.isfinite(loss) else failed + 1
            if failed == PATIENCE:
                raise HfQuantError(
                    f"{block.name}: the loss of its learned codes is {loss}, {PATIENCE} steps in a row; finished blocks "
                    "are kept, the same command goes on from there; --method calibrated needs no learning"
                )
            if not failed:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * _rate(step, steps)
                optimizer.step()
                optimizer.zero_grad()  # their memory is wanted by the gradients of the weights
                for name, latent in latents.items():
                    latent.keep_inside()
                    put(block, name, latent.weight())
            step += 1
        yield


def _step(
    block: Block, hidden: HiddenStates, wanted: HiddenStates, number: int, latents: dict[str, Latent], recipe: Recipe
) -> float:  # fmt: skip
    """Give every latent its gradient over a batch, of whichever rank; returns the loss."""
    loss = 0.0
    if recipe.ranks.owner(number) == recipe.ranks.rank:
        for batch, target in _parts(hidden.batch(number, block.name), wanted[number]):
            error = _error(block, batch, target) * (len(target) / len(wanted[number]))
            error.backward()
            loss += error.item()
        give_back_memory(WORTH)  # what it took to get there, before the gradients of codes and scales are made
    (loss,) = recipe.ranks.total(loss)
    for name, latent in latents.items():
        parameter, geometry = parameter_of(block, name)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
        recipe.ranks.sum_(gradient)
        latent.take(geometry.matrix(gradient).contiguous())
        if not bool(latent.factor.grad.isfinite().all()):  # type: ignore[union-attr]
            loss = math.nan
    return loss


def _parts(batch: Batch, wanted: Tensor) -> Iterator[tuple[Batch, Tensor]]:
    """The batch, with what the block should give, or long sequences one after the other: what gradients need is kept for one."""
    if batch.undivided or batch.states.shape[1] < LONG:
        yield batch, wanted
        return
    for states, target in zip(batch.states.split(1), wanted.split(1), strict=True):
        yield batch._replace(states=states), target


def _error(block: Block, given: Batch, wanted: Tensor) -> Tensor:
    """Squared error of the output of every token over its squared size, the mean of all tokens."""
    output = block.run(given)
    return relative_error(output, wanted.to(output.device)).mean()


def _loss(block: Block, hidden: HiddenStates, wanted: HiddenStates, numbers: list[int], recipe: Recipe) -> float:
    ranks = recipe.ranks
    errors = [
        _error(block, hidden.batch(i, block.name), wanted[i]).item() for i in numbers if ranks.owner(i) == ranks.rank
    ]
    (total,) = ranks.total(sum(errors))
    return total / len(numbers)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short rise, then half a cosine."""
    return min(1.0, (step + 1) / WARM) * (LAST + (1 - LAST) * (1 + math.cos(math.pi * step / steps)) / 2)


@contextmanager
def _only_these_learn(block: Block, names: Iterable[str]) -> Iterator[None]:
    """Inside, gradients are kept for the weights of these layers, and for nothing else."""
    before = [(parameter, parameter.requires_grad) for parameter in block.module.parameters()]
    trained = {id(parameter_of(block, name)[0]) for name in names}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in trained)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None


@contextmanager
def _rounded_inputs(block: Block, codes: dict[str, QuantizedTensor]) -> Iterator[None]:
    """Inside, layers whose scheme rounds activations are given rounded ones; gradients pass straight through."""

    def rounding(weight: QuantizedTensor) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            geometry = geometry_of(module)
            return (geometry.with_rows(args[0], rounded(geometry.rows(args[0]), weight)), *args[1:])

        return hook

    modules = dict(block.module.named_modules())
    handles = [
        modules[block.local(name)].register_forward_pre_hook(rounding(quantized))
        for name, quantized in codes.items()
        if quantized.scheme.activations
        and block.local(name) in modules  # the inputs of stacked experts are out of reach
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
