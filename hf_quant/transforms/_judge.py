"""Tests whether a block still computes the same, at every module that has weights, for each token and each channel.

The output of the whole block would not show it: one massive activation (as the first token of real models has, Sun et al.,
arXiv:2402.17762) makes any change of all other tokens look small.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_quant.core.private_torch import tree_leaves, tree_map_only
from hf_quant.transforms import Stage

CLOSE = 1e-3  # largest relative change of the output of a token or a channel that counts as rounding
Rewrite = Callable[[Tensor], Tensor]


def changed(stage: Stage, producer: str, output: Rewrite, consumers: Collection[str], inputs: Rewrite) -> str | None:
    """The first module outside of ``consumers`` that reads the output of ``producer``.

    Only inputs and outputs are rewritten, while the block runs on a few tokens; no weight changes.

    Args:
        stage: Its block is run, or the float one if there are two.
        producer: Local name of a module.
        output: Rewrites the output of the producer.
        consumers: Local names of the modules that should be the only ones to read it.
        inputs: Undoes ``output`` at the inputs of the consumers.

    Returns:
        Local name of a module whose output changes, ``""`` for the block itself; None if none changes.
    """
    judge = stage.twin if stage.twin is not None else stage.block
    producer_parameters = {id(parameter) for parameter in judge.get_submodule(producer).parameters()}
    names = [n for n, m in judge.named_modules() if {id(p) for p in m.parameters()} - producer_parameters]
    before = _outputs(stage, judge, names)
    hooks = [judge.get_submodule(producer).register_forward_hook(lambda _m, _a, out: _rewritten(out, output))]
    hooks += [
        judge.get_submodule(n).register_forward_pre_hook(lambda _m, args: (inputs(args[0]), *args[1:]))
        for n in consumers
    ]
    with _removed(hooks):
        after = _outputs(stage, judge, names)
    return next((name for name in reversed(names) if not _same(before.get(name, []), after.get(name, []))), None)


def call_of(stage: Stage, name: str) -> Callable[[], Any]:
    """A function that repeats the first call of a module, recorded while its block runs on a few tokens."""
    module, seen = stage.block.get_submodule(name), []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    with _removed([module.register_forward_pre_hook(hook, with_kwargs=True)]):
        stage.probe(stage.block)
    args, kwargs = seen[0]
    return lambda: module(*args, **kwargs)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether no row and no column of ``[..., K]`` changes by more than rounding; NaN is never close."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return bool((one == other).all())
    rows, others = (outputs.float().reshape(-1, outputs.shape[-1] if outputs.ndim else 1) for outputs in (one, other))
    off = others - rows
    return all(bool((off.norm(dim=axis) <= CLOSE * rows.norm(dim=axis)).all()) for axis in (0, 1))


def _outputs(stage: Stage, judge: nn.Module, names: Collection[str]) -> dict[str, list[Tensor]]:
    """The outputs of modules in each of their calls."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            outputs = [
                leaf.clone() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)
            ]  # cloned, since a later module may add to it in place
            seen.setdefault(name, []).extend(outputs)

        return hook

    with _removed([judge.get_submodule(name).register_forward_hook(keep(name)) for name in names]):
        stage.probe(judge)
    return seen


def _rewritten(out: Any, rewrite: Rewrite) -> Any:
    return tree_map_only(Tensor, rewrite, out)


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(map(close, before, after))


@contextmanager
def _removed(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
