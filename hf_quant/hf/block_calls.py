"""The arguments that the blocks of a model are called with, recorded while every block returns its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn

from hf_quant.core.private_torch import tree_leaves
from hf_quant.errors import HfQuantError
from hf_quant.hf._hooks import replaced
from hf_quant.solve.block import Call, states_of

Calls = dict[str, tuple[Call, Call]]  # name of each block to its arguments for a batch, and for one sequence


@dataclass
class Passing:
    """The recorded inputs and arguments.

    Attributes:
        entered: Hidden states that entered the first block, one tensor for each run.
        calls: Name of each block to its other arguments; must be emptied before a batch of another size.
    """

    entered: list[Tensor] = field(default_factory=list)
    calls: dict[str, Call] = field(default_factory=dict)
    _returned: list[Any] = field(default_factory=list)  # the output of the first block
    _computed: list[Tensor] = field(default_factory=list)  # tensors in it that are neither hidden states nor arguments

    def stand_in(self, name: str, forward: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
        """A ``forward`` for the block of that name that returns its input; ``forward`` is its own."""

        def passing(*args: Any, **kwargs: Any) -> Any:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            self._look(name, (args, kwargs))
            if first:
                self.entered.append(hidden)
            if not self._returned:
                self._learn(name, forward(hidden, *args, **kwargs), (args, kwargs))
            form = self._returned[0]
            return hidden if isinstance(form, Tensor) else type(form)((hidden, *form[1:]))

        return passing

    def _look(self, name: str, call: Call) -> None:
        if any(argument is computed for argument in _tensors(call) for computed in self._computed):
            raise HfQuantError(
                f"{name}: takes more of the block before than hidden states, which cannot be calibrated yet"
            )
        if not alike(self.calls.setdefault(name, call), call):
            raise HfQuantError(f"{name}: takes inputs that depend on the tokens, which cannot be calibrated yet")

    def _learn(self, name: str, returned: Any, call: Call) -> None:
        known = [states_of(name, returned), *_tensors(call)]
        self._returned.append(returned)
        self._computed += [tensor for tensor in _tensors(returned) if not any(tensor is other for other in known)]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def passed_through(blocks: Mapping[str, nn.Module]) -> Iterator[Passing]:
    """Inside, blocks return their input, in the form in which the first block returns its output.

    Args:
        blocks: In order; the first one has its weights, in the dtype of the hidden states, and is computed once.

    Raises:
        HfQuantError: The arguments of a block differ between batches, or depend on what another block has computed.
    """
    seen = Passing()
    with ExitStack() as stack:
        for i, (name, block) in enumerate(blocks.items()):
            stack.enter_context(replaced(block, "forward", seen.stand_in(name, block.forward, first=i == 0)))
        yield seen


def alike(one: Any, other: Any) -> bool:
    """Whether two arguments have the same value. Objects without an equality of their own count as equal if their types are."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if is_dataclass(one):
        return all(alike(getattr(one, member.name), getattr(other, member.name)) for member in fields(one))
    if getattr(type(one), "__eq__", None) != object.__eq__:
        return bool(one == other)
    return hasattr(one, "__dict__") and not isinstance(
        one, Enum
    )  # dtypes and members of enumerations are equal only to themselves
