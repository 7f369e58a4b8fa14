"""The arguments that the blocks of a model are called with, recorded while every block returns its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_quant.core.private_torch import tree_leaves
from hf_quant.errors import UnchainedError
from hf_quant.hf._hooks import replaced
from hf_quant.solve.block import states_of
from hf_quant.solve.hidden_states import Call


@dataclass
class Passing:
    """One run of a model in which blocks return their input.

    Attributes:
        results: Name of the last block of each chain that is finished to its outputs in this run.
        steps: Name, input and other arguments of each block, in the order of calling.
        starts: Blocks whose input is not what the block before returned.
        carrying: Lists of which a block takes more of the one before than hidden states.
    """

    results: Mapping[str, Tensor] = field(default_factory=dict)
    steps: dict[str, tuple[Tensor, Call]] = field(default_factory=dict)
    starts: list[str] = field(default_factory=list)
    carrying: set[str] = field(default_factory=set)
    _returned: Tensor | None = None  # by the block before


@dataclass
class Forms:
    """In which form the blocks of each list return hidden states: that of the first one, which is computed.

    Attributes:
        returned: Name of the list to what its first block returned.
        extras: Name of the list to the tensors among it that are neither hidden states nor arguments.
    """

    returned: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, list[Tensor]] = field(default_factory=dict)

    def learn(self, name: str, returned: Any, call: Call) -> None:
        """Keep what the first block of a list has returned."""
        known = [states_of(name, returned), *tensors_in(call)]
        self.returned[list_of(name)] = returned
        new = [tensor for tensor in tensors_in(returned) if not any(tensor is other for other in known)]
        self.extras[list_of(name)] = new

    def forget(self, name: str) -> None:
        """Let the first block of a list be computed once more."""
        self.returned.pop(name, None)

    def like(self, name: str, hidden: Tensor) -> Any:
        """``hidden`` in the form of the list."""
        form = self.returned[list_of(name)]
        return hidden if isinstance(form, Tensor) else type(form)((hidden, *form[1:]))


def list_of(block: str) -> str:
    """Name of the list that a block is in."""
    return block.rpartition(".")[0]


def stand_in(name: str, forward: Callable[..., Any], run: Passing, forms: Forms) -> Callable[..., Any]:
    """A ``forward`` for the block of that name that returns its input; ``forward`` is its own."""

    leading = _leading(forward)

    def passing(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = _without_states(name, *_without_caches(args, kwargs))
        if leading in kwargs:  # as in reversible layers, which take a second stream beside the hidden states
            raise UnchainedError(f"{name}: takes {leading} before its hidden states")
        if name in run.steps:
            raise UnchainedError(f"{name}: is run more than once")
        if any(leaf is extra for leaf in tensors_in((args, kwargs)) for extra in forms.extras.get(list_of(name), [])):
            run.carrying.add(list_of(name))
        if hidden is not run._returned:
            run.starts.append(name)
        run.steps[name] = hidden, (args, kwargs)
        if list_of(name) not in forms.returned:
            forms.learn(name, _same_shape(name, hidden, forward(hidden, *args, **kwargs)), (args, kwargs))
        run._returned = run.results.get(name, hidden)
        return forms.like(name, run._returned)

    return passing


def _same_shape(name: str, hidden: Tensor, returned: Any) -> Any:
    """What a block returned.

    Raises:
        UnchainedError: Its hidden states have another shape than those it was given, as in stages that halve an image.
    """
    if (shape := states_of(name, returned).shape) != hidden.shape:
        raise UnchainedError(f"{name}: makes hidden states {list(shape)} of {list(hidden.shape)}")
    return returned


def _leading(forward: Callable[..., Any]) -> str | None:
    """Name of the first argument, which hidden states are given to; None if it has none."""
    first = next(iter(signature(forward).parameters.values()), None)
    return first.name if first is not None and first.kind is Parameter.POSITIONAL_OR_KEYWORD else None


def _without_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with None for caches of keys and values, which would grow with every run of a block."""
    return (
        tuple(None if isinstance(value, Cache) else value for value in args),
        {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()},
    )


def _without_states(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states among the arguments of a block, and the others."""
    if args:
        return args[0], args[1:], kwargs
    first = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "")
    if not isinstance(kwargs.get(first), Tensor):
        raise UnchainedError(f"{name}: takes no hidden states")
    return kwargs[first], (), {key: value for key, value in kwargs.items() if key != first}


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def passed_through(blocks: Mapping[str, nn.Module], run: Passing, forms: Forms) -> Iterator[Passing]:
    """Inside, blocks return their input, in the form in which the first block of their list returns its output.

    Args:
        blocks: The first one of each list has its weights, in the dtype of the hidden states.
        run: What to record.
        forms: Learned here, unless they are known.

    Raises:
        UnchainedError: A block is run twice, takes no hidden states, or returns none.
    """
    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.enter_context(replaced(block, "forward", stand_in(name, block.forward, run, forms)))
        yield run


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
