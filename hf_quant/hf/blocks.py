"""The blocks of a model, the chains that they run in, and what enters each chain.

A block is an element of a list of modules that holds layers of the plan. A chain is a row of blocks of which each takes what the one
before returned: the layers of a decoder, or those of an encoder and then those of its decoder. Chains are calibrated one after the
other: the model is run around its blocks, which return their input, or, at the end of a chain that is finished, its outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.private_torch import tree_map_only
from hf_quant.core.scheme import QuantScheme
from hf_quant.data.batches import Inputs
from hf_quant.errors import HfQuantError, UnchainedError
from hf_quant.hf.batch_inputs import arguments, root_of
from hf_quant.hf.block_calls import Forms, Passing, alike, list_of, passed_through, tensors_in
from hf_quant.hf.plan import Plan
from hf_quant.solve.block import inside
from hf_quant.solve.hidden_parts import HiddenParts
from hf_quant.solve.hidden_states import Call, Carried, HiddenStates
from hf_quant.solve.ranks import Ranks

BATCH = 2  # sequences in a batch of hidden states; larger batches exceed the processor's caches and gain nothing
Calls = dict[str, tuple[Call, Call]]  # name of each block to its arguments for a batch, and for one sequence
NO_CALL: Call = ((), {})


def layers_of(plan: Plan, block: str) -> dict[str, QuantScheme]:
    """The quantized layers of a block, in the order of the model."""
    return {name: scheme for name, scheme in plan.schemes.items() if name.startswith(inside(block))}


def refuse_other_kinds(kind: Any, method: str) -> None:
    """Refuse models that read no text; ``kind`` is the class of the model."""
    reads, takes = getattr(kind, "main_input_name", "input_ids"), inspect.signature(kind.forward).parameters
    # a part of a model says what the whole model reads; "inputs" are whatever its preprocessor takes, as in Perceiver
    if "input_ids" in takes and (reads not in takes or reads == "inputs"):
        reads = "input_ids"
    if reads != "input_ids":
        raise HfQuantError(
            f"{method} calibrates on text, and {kind.__name__} reads {reads}: give batches of that, as its processor makes "
            "them; rtn and hqq need none"
        )


def blocks_of(model: Any, plan: Plan) -> dict[str, nn.Module]:
    """The elements of the outermost lists of modules that hold layers of the plan, by name.

    Lists in which only convolutions are quantized, as those before the encoder of a model of sounds, count as none: they are seldom
    chains of blocks, and would keep the others from being followed.
    """
    blocks: dict[str, nn.Module] = {}
    done: tuple[str, ...] = ()
    for name, module in model.named_modules():
        nested = isinstance(module, nn.ModuleList) and any(isinstance(element, nn.ModuleList) for element in module)
        if isinstance(module, nn.ModuleList) and not nested and not f"{name}.".startswith(done):
            elements = {f"{name}.{i}": element for i, element in enumerate(module)}
            if any(layers_of(plan, element).keys() - plan.convolutions for element in elements):
                blocks |= elements
                done = (*done, f"{name}.")
    return blocks


@dataclass
class Around:
    """A model around its blocks.

    Attributes:
        base: What is run.
        blocks: As `blocks_of`.
        ids: Token ids ``[S, T]``; not looked at where there are batches.
        ranks: The processes that share the job.
        batches: Inputs of the model.
        chains: Names of blocks, chain by chain, in the order they run; blocks that do not run are in none.
        kept: Blocks inside of chains whose outputs later chains take, besides that of the last one.
    """

    base: Any
    blocks: Mapping[str, nn.Module]
    ids: Tensor
    ranks: Ranks
    batches: Sequence[Inputs] = ()
    chains: list[list[str]] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    _forms: Forms = field(default_factory=Forms)
    _carrying: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls, model: Any, blocks: Mapping[str, nn.Module], ids: Tensor, batches: Sequence[Inputs], ranks: Ranks
    ) -> Around:
        """For a whole model, of which no more is run than the inputs need."""
        base = root_of(model, list(batches[0])) if batches else model.base_model
        return cls(base, blocks, ids, ranks, batches)

    def find_chains(self) -> None:
        """Fill `chains`. The first block of each list must have its weights.

        Raises:
            UnchainedError: Blocks are called in a way that cannot be followed; names the block.
            HfQuantError: The model needs more than token ids.
        """
        if not self.blocks:
            raise UnchainedError(f"{type(self.base).__name__}: has no list of blocks with layers to quantize")
        run = self._first_run()
        self._carrying = run.carrying
        for name in run.steps:
            if list_of(name).rpartition(".")[2].isdigit():
                raise UnchainedError(f"{list_of(name)}: is in a list of lists of blocks")
            if name in run.starts:
                self.chains.append([])
            self.chains[-1].append(name)
        if self.batches:
            self._find_kept()
        else:
            self._check_lengths(run)

    def _check_lengths(self, run: Passing) -> None:
        self._forms = Forms()
        for name, (states, _) in self._run({"input_ids": self.ids[:2]}, {}).steps.items():
            one = run.steps[name][0] if name in run.steps else states
            if states.shape != (len(self.ids[:2]), *one.shape[1:]):
                raise UnchainedError(
                    f"{name}: its hidden states {list(states.shape)} are not {len(self.ids[:2])} sequences of one length"
                )

    def _first_run(self) -> Passing:
        try:
            return self._run(self.batches[0] if self.batches else {"input_ids": self.ids[:1]}, {})
        except HfQuantError:
            raise
        except (
            AttributeError,
            TypeError,
            ValueError,
        ) as error:  # as of a model that needs the places of words on a page
            if not self.batches:
                raise HfQuantError(
                    f"{type(self.base).__name__}: does not run on token ids alone ({error}); rtn and hqq need no text"
                ) from error
            raise self._unlike_its_output(error) from error
        except (RuntimeError, IndexError, AssertionError) as error:
            if not self.batches:
                raise
            raise self._unlike_its_output(error) from error

    def _unlike_its_output(self, error: Exception) -> UnchainedError:
        """The model's code found the input of a block where its output should be, which has another shape."""
        return UnchainedError(f"{type(self.base).__name__}: blocks that return their input end in: {error}")

    def _find_kept(self) -> None:
        """Fill `kept`: blocks inside of chains that change what enters a later chain if their outputs change."""
        for number, chain in enumerate(self.chains[:-1]):
            later = [name for others in self.chains[number + 1 :] for name in others]
            steps = self._run(self.batches[0], {}).steps
            ends = {name: steps[name][0] for name in (chain[-1], *(others[-1] for others in self.chains[:number]))}
            before = self._run(self.batches[0], ends).steps
            for name in chain[:-1]:
                after = self._run(self.batches[0], ends | {name: steps[name][0] + 1}).steps
                if not all(alike(before[block], after[block]) for block in later):
                    self.kept.add(name)

    def first_blocks(self) -> list[str]:
        """The first block of each list."""
        return list({list_of(name): name for name in reversed(list(self.blocks))}.values())

    def enter(
        self, chain: list[str], results: Sequence[Mapping[str, HiddenStates]], files: Sequence[Path | None]
    ) -> tuple[list[HiddenStates], Calls]:
        """The hidden states that enter a chain, and the arguments of its blocks.

        Args:
            chain: One of `chains`.
            results: For each stream of states (that of the quantized model, and that of the float model if it is followed) the last
                block of each chain before, with its outputs.
            files: For each stream, where to keep its states; None for memory.

        Returns:
            The states of each stream, and the arguments that all batches share, by block; where they differ, the states hold them.

        Raises:
            HfQuantError: What a block takes from the block before, besides hidden states, depends on the tokens.
        """
        first, calls = self._enter(chain, results[0], files[0])
        streams = [first]
        for before, file in zip(results[1:], files[1:], strict=True):
            if before:
                streams.append(self._enter(chain, before, file)[0])
            else:
                streams.append(first.copied(file))
        return streams, calls

    def _enter(
        self, chain: list[str], results: Mapping[str, HiddenStates], file: Path | None
    ) -> tuple[HiddenStates, Calls]:
        if self.batches:
            entered: list[Tensor] = []
            calls = self._record(chain, results, 1, lambda _number, states: entered.append(states.float().cpu()))
            return HiddenParts.of(entered, _spared(calls), self._carried(chain, calls), file), _no_calls(chain)
        count, world = len(self.ids), self.ranks.world
        size = next(n for n in range(min(BATCH, max(1, count // max(2, world))), 0, -1) if count % n == 0)
        states, calls = self._states(chain, results, size, file)
        if any(not alike(batches[0], other) for batches in calls.values() for other in batches[1:]):
            if size > 1:  # so that a batch need never be divided
                states, calls = self._states(chain, results, 1, file)
            return HiddenStates(states.states, 1, _spared(calls), self._carried(chain, calls)), _no_calls(chain)
        together = {name: batches[0] for name, batches in calls.items()}
        alone = together
        if size > 1:
            first = {name: result.of_batch(0, 1) for name, result in results.items()}
            steps = self._pass(chain, {"input_ids": self.ids[:1]}, first).steps
            alone = {name: steps[name][1] for name in chain}
        return states, {name: (together[name], alone[name]) for name in chain}

    def _states(
        self, chain: list[str], results: Mapping[str, HiddenStates], size: int, file: Path | None
    ) -> tuple[HiddenStates, dict[str, list[Call]]]:
        """The states of one shape that enter a chain, in batches of ``size``, and the other arguments of its blocks for each."""
        room: list[HiddenStates] = []

        def keep(number: int, entered: Tensor) -> None:
            if not room:
                room.append(HiddenStates.room((len(self.ids), *entered.shape[1:]), size, torch.float32, file))
            expected = room[0].states[number * size : (number + 1) * size].shape
            if entered.shape != expected:
                raise HfQuantError(
                    f"{chain[0]}: its hidden states {list(entered.shape)} are not {expected[0]} sequences of one length, and "
                    "only such can be calibrated yet; rtn and hqq need no text"
                )
            room[0].put(number, entered)

        calls = self._record(chain, results, size, keep)
        return room[0], calls

    def _record(
        self, chain: list[str], results: Mapping[str, HiddenStates], size: int, keep: Callable[[int, Tensor], None]
    ) -> dict[str, list[Call]]:
        """Hand on the states that enter a chain for each batch; the other arguments of its blocks for each."""
        calls: dict[str, list[Call]] = {name: [] for name in chain}
        batches = self.batches or [{"input_ids": ids} for ids in self.ids.split(size)]
        for number, batch in enumerate(batches):
            before = {name: result.of_batch(number, size) for name, result in results.items()}
            steps = self._pass(chain, batch, before).steps
            keep(number, steps[chain[0]][0])
            for name in chain:
                calls[name].append(steps[name][1])
        return calls

    def _carried(self, chain: list[str], calls: Mapping[str, list[Call]]) -> dict[str, Carried]:
        """Which arguments each block takes from what the block before returned, besides hidden states, with their places there.

        Raises:
            HfQuantError: It takes a part of one that depends on the tokens.
        """
        where = list_of(chain[0])
        if where not in self._carrying:
            return {}
        extras = {id(tensor) for tensor in self._forms.extras[where]}
        places = {id(value): place for place, value in enumerate(self._forms.returned[where]) if id(value) in extras}
        carried: dict[str, Carried] = {}
        for name in chain[1:]:
            first, last = _by_key(calls[name][0]), _by_key(calls[name][-1])
            carried[name] = {key: places[id(value)] for key, value in last.items() if id(value) in places}
            for key in last.keys() - carried[name]:
                if any(id(part) in extras for part in tensors_in(last[key])) and not alike(first[key], last[key]):
                    raise HfQuantError(
                        f"{name}: takes more of the block before than hidden states and whole arguments, which depends on the "
                        "tokens and cannot be calibrated yet"
                    )
        return carried

    def _pass(self, chain: list[str], inputs: Mapping[str, Tensor], results: Mapping[str, Tensor]) -> Passing:
        """Run the model around its blocks to enter a chain."""
        if list_of(chain[0]) in self._carrying and chain[0] in self.first_blocks():
            self._forms.forget(list_of(chain[0]))
        return self._run(inputs, results)

    def _run(self, inputs: Mapping[str, Tensor], results: Mapping[str, Tensor]) -> Passing:
        device = self.ids.device
        given = {name: tensor.to(device) for name, tensor in inputs.items()}
        run = Passing({name: states.to(device) for name, states in results.items()})
        with passed_through(self.blocks, run, self._forms), _wide_embeddings(self.base), _same_random_numbers():
            self.base(**arguments(self.base, given))
        return run


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Inside, a model that draws random numbers, as those that mask patches, draws the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _spared(calls: Mapping[str, list[Call]]) -> dict[str, list[Call]]:
    return {name: [_sparing(batches[0], call) for call in batches] for name, batches in calls.items()}


def _no_calls(chain: list[str]) -> Calls:
    """Where the arguments of blocks differ from batch to batch, the states hold them."""
    return dict.fromkeys(chain, (NO_CALL, NO_CALL))


@contextmanager
def _wide_embeddings(base: nn.Module) -> Iterator[None]:
    """Inside, embeddings give float32, whatever they are stored in."""
    handles = [
        module.register_forward_hook(lambda _module, _args, out: tree_map_only(Tensor, _wide, out))
        for module in base.modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _by_key(call: Call) -> dict[int | str, Any]:
    """All arguments by place or name."""
    return dict(enumerate(call[0])) | call[1]


def _sparing(first: Call, call: Call) -> Call:
    """The same arguments, with those of the first batch where they are equal, so that memory holds them once."""
    args = tuple(one if alike(one, other) else other for one, other in zip(first[0], call[0], strict=True))
    kwargs = {name: first[1][name] if alike(first[1].get(name), other) else other for name, other in call[1].items()}
    return args, kwargs
