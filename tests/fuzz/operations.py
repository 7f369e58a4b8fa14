"""Operations of ``torch.ops.hf_quant`` given wrong arguments: each says what is wrong, or is right.

Right is what the same values give as ordinary contiguous tensors, in the shape and dtype that the operation announces for
tensors without values. Operations of Triton go through their checks alone, or with TRITON_INTERPRET=1 through its interpreter.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import KernelError
from hf_quant.kernels._shared import ops
from tests.fuzz.entrances import Hang, ours, patience, wrong_message
from tests.fuzz.mutate import TENSORS
from tests.kernels.operations import arguments, built, called, kind_of, runs_here

SLUGS = ["W4A16-g32-asym", "W4A16-g32", "W8A16-g32", "W3A16-g64", "W2A16-g32-asym", "W4A16-g-1", "W4A16-g32-nf4"]
TAKES = {"codebook": SLUGS[:1], "cpu_int4": SLUGS[:4], "triton_int8": ["W4A16-g64-asym", "W4A16-g64", "W8A16-g-1"],
         "triton_wna16": SLUGS, "triton_experts": SLUGS}  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 47, 48, 64, 127, 128, 129, 255, 256, 10**5, 2**31, 2**40, 2**62,
           2**63 - 1, -(2**63), 2**63, 2**100]  # fmt: skip
FLOATS = [0.0, 0.5, 6.0, -1.0, 1e308, float("inf"), float("-inf"), float("nan")]
WORDS = [*SLUGS, "W8A8", "W4A8-o5%-columns", "W4A16-g48", "W4A16-g99999", "W9A16", "", "x" * 5000, "\0", "\ud800"]
JUNK: list[Any] = [None, 0, 1.5, "", "cpu", [], [1, 2], torch.float32, True]


@dataclass(frozen=True)
class Outcome:
    """What became of one call: ``"right"``, ``"refused"``, ``"refused by PyTorch"`` or ``"fault"``, and what was said."""

    state: str
    said: str = ""
    result: Tensor | None = None


# -- wrong arguments ----------------------------------------------------------------------------------------------


def _misaligned(_: Random, t: Tensor) -> Tensor:
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


def _repeated(chance: Random, t: Tensor) -> Tensor:
    """The first of an axis in place of all others, in memory but once."""
    axis = chance.randrange(t.ndim)
    return t.narrow(axis, 0, 1).expand(t.shape)


def _many(chance: Random, t: Tensor) -> Tensor:
    return t[:1].expand(chance.choice([70, 300]), *t.shape[1:])


def _filled(chance: Random, t: Tensor) -> Tensor:
    return torch.full_like(t, chance.choice([1, -1, 3, 100, 127, 128, -3, 30000, 2**31 - 1, float("nan")]))


SHAPES: list[Callable[[Random, Tensor], Tensor]] = [
    lambda _, t: t.to("meta"), lambda _, t: t[..., :0], lambda _, t: t[0], lambda _, t: t.sum(),
    lambda _, t: torch.stack([t, t], -1)[..., 0], lambda _, t: t.mT.contiguous().mT, lambda _, t: t.mT, lambda _, t: t.permute(*reversed(range(t.ndim))),
    lambda _, t: torch.cat([t, t], -1)[..., : t.shape[-1]], lambda _, t: t.repeat_interleave(2, 0)[::2],
    lambda _, t: torch._neg_view(t), lambda _, t: torch._neg_view(-t), lambda _, t: t.to_sparse(),
    lambda _, t: t.to_mkldnn(), lambda _, t: t.float().to_mkldnn(), lambda _, t: t.float().T.contiguous().to_mkldnn(),
    lambda _, t: t.clone().requires_grad_(), lambda _, t: torch.nn.Parameter(t, requires_grad=False),
    _misaligned, _repeated, _many, _filled,
]  # fmt: skip


def _wrong(chance: Random, arg: Any, type_: str, here: bool) -> Any:
    """Another value in place of an argument; of another type only where PyTorch's dispatcher looks at types, ``here``."""
    how = chance.random()
    if how < 0.06 and here:
        return chance.choice([*JUNK, torch.ones(1)])
    if how < 0.15 and type_.startswith("Optional"):
        return None if arg is not None else torch.ones(chance.choice([(1,), (16,), (48,), (48, 4), (3, 4, 16)]))
    if isinstance(arg, Tensor):
        try:
            return chance.choice([*TENSORS, *SHAPES])(chance, arg)
        except (RuntimeError, TypeError, IndexError, ValueError, OverflowError):
            return arg  # not for a tensor like this one
    if isinstance(arg, str):
        return chance.choice(WORDS)
    if isinstance(arg, float):
        return chance.choice(FLOATS)
    return chance.choice(NUMBERS if here else [n for n in NUMBERS if abs(n) < 2**63]) if arg is not None else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_quiet()
def case_of(chance: Random) -> tuple[str, tuple[Any, ...]]:
    """An operation that runs or is checked here, and what it is given: one to three arguments are wrong, or strange."""
    name = chance.choice(sorted(name for name in ops.OPS if built(name)))
    slug = chance.choice(TAKES.get(kind_of(name), SLUGS[:-1]))
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    args = list(arguments(name, slug, chance.choice([0, 1, 3, 3, 70, 200]), dtype))
    types = [str(argument.type) for argument in ops.OPS[name]._opoverload._schema.arguments]
    for _ in range(chance.choice([1, 1, 2, 3])):
        at = chance.randrange(len(args))
        args[at] = _wrong(chance, args[at], types[at], runs_here(name))
        if chance.random() < 0.05 and types[other := chance.randrange(len(args))] == types[at]:
            args[at], args[other] = args[other], args[at]
    return name, tuple(args)


# -- what comes of them -------------------------------------------------------------------------------------------


def _call(name: str, args: tuple[Any, ...]) -> Outcome:
    try:
        with patience():
            return Outcome("right", result=called(name)(*args))
    except Hang:
        return Outcome("fault", "no end")
    except KernelError as error:
        said = str(error)
        return Outcome("fault", wrong) if (wrong := _unclear(name, said)) else Outcome("refused", said)
    except Exception as error:
        if _by_dispatcher(error):
            return Outcome("refused by PyTorch", str(error))
        return Outcome("fault", f"{type(error).__name__} at {ours(error)}: {str(error)[:200]!a}")


def _unclear(name: str, said: str) -> str:
    """What is wrong with a message: it names the operation and an argument, or the devices of all."""
    names = {argument.name for argument in ops.OPS[name]._opoverload._schema.arguments} | {"first", "tensors"}
    if not said.startswith(f"{name}: ") or not names & set(re.findall(r"\w+", said)):
        return f"message names no operation or no argument: {said[:200]!a}"
    return wrong_message(said)


def _by_dispatcher(error: Exception) -> bool:
    """Whether PyTorch refused a call by the types of its arguments, or has no such operation for a device or layout."""
    if ours(error):
        return False
    if isinstance(error, NotImplementedError):
        return "hf_quant::" in str(error) or '"neg_cpu"' in str(error)  # it negates views before it calls
    said = str(error)
    return isinstance(error, RuntimeError | TypeError | OverflowError | ValueError) and (
        ("hf_quant::" in said and ("Expected a value of type" in said or "Declaration:" in said)) or "verflow" in said
    )


def _ordinary(arg: Any) -> Any:
    """The same values in contiguous memory of their own."""
    if not isinstance(arg, Tensor) or arg.layout is not torch.strided or arg.is_meta:
        return arg
    if arg.is_neg() and not arg.dtype.is_signed:
        return arg  # which PyTorch does not negate, so there is no ordinary tensor of the same values
    return arg.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def _differs(got: Tensor, want: Tensor) -> str:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)}, and {want.dtype} {list(want.shape)} of contiguous tensors"
    dtype, got, want = got.dtype, got.detach().double(), want.detach().double()
    largest = float(want[want.isfinite()].abs().amax()) if want.isfinite().any() else 0.0
    near = torch.isclose(
        got, want, rtol=0, atol=16 * torch.finfo(dtype).eps * largest, equal_nan=True
    )  # order of sums
    return (
        "" if near.all() else f"{int((~near).sum())} of {near.numel()} results differ from those of contiguous tensors"
    )


def _announced(name: str, args: tuple[Any, ...], result: Tensor) -> str:
    """How a result differs from what the operation gives for tensors without values."""
    if any(isinstance(arg, Tensor) and arg.layout is not torch.strided for arg in args):
        return ""
    operation = ops.OPS[name]
    types = [str(argument.type) for argument in operation._opoverload._schema.arguments]
    told = operation(*map(_without_values, args, types))
    if (told.shape, told.dtype) == (result.shape, result.dtype):
        return ""
    return f"result is {result.dtype} {list(result.shape)}, announced {told.dtype} {list(told.shape)}"


def _without_values(arg: Any, kind: str) -> Any:
    """A tensor on the meta device; the number, where PyTorch takes a tensor of one element for a number."""
    if not isinstance(arg, Tensor):
        return arg
    if "Tensor" in kind:
        return arg.to("meta")
    return int(arg) if "int" in kind else arg.item()


@_quiet()
def outcome(name: str, args: tuple[Any, ...]) -> Outcome:
    """What becomes of one call, held against that of the same values in contiguous tensors."""
    first, second = _call(name, args), _call(name, tuple(map(_ordinary, args)))
    if "fault" in (first.state, second.state):
        return first if first.state == "fault" else second
    if first.state == "refused" and "is not contiguous" in first.said:
        return first
    if first.state != second.state:
        return Outcome("fault", f"{first.state} ({first.said[:200]}), contiguous {second.state} ({second.said[:200]})")
    if first.result is not None and second.result is not None:
        wrong = _differs(first.result, second.result) or _announced(name, args, first.result)
        return Outcome("fault", wrong) if wrong else first
    return first


def faults(chance: Random) -> Iterator[str]:
    """What goes wrong with one case."""
    with torch.random.fork_rng():
        torch.manual_seed(chance.randrange(2**31))
        name, args = case_of(chance)
        found = outcome(name, args)
        if found.state == "fault":
            yield f"{name}({', '.join(map(_shown, args))}): {found.said}"


def _shown(arg: Any) -> str:
    if not isinstance(arg, Tensor):
        return ascii(arg)[:60]
    strides = "" if arg.layout is not torch.strided or arg.is_contiguous() else f" strides {list(arg.stride())}"
    layout = "" if arg.layout is torch.strided else f" {arg.layout}"
    return f"{str(arg.dtype).removeprefix('torch.')} {list(arg.shape)} {arg.device}{strides}{layout}"
