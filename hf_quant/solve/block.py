"""One decoder layer during calibration: running it, and replacing its weights by quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.geometry import Geometry, geometry_of
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import UnchainedError
from hf_quant.nn.experts import stacks
from hf_quant.solve.hidden_states import Batch, Call


@dataclass(frozen=True)
class Stored:
    """The parameters of a block in the checkpoint of the float model, by full name.

    Attributes:
        dtype: The dtype that a parameter is stored in, quantized or not.
        read: Reads a parameter.
    """

    dtype: Callable[[str], torch.dtype]
    read: Callable[[str], Tensor]


@dataclass
class Block:
    """One decoder layer during calibration.

    Attributes:
        name: ``"model.layers.3"``; empty for a whole model.
        module: The layer, in memory.
        layers: Full name of each linear layer (or stack of experts) to quantize, to its scheme.
        call: Its arguments besides hidden states, for a whole batch; the same for all batches.
        alone: Its arguments besides hidden states, for a batch of one sequence.
        rows: Largest number of sequences to run together; 1 after memory has run out.
        stored: Its parameters in the checkpoint; None if they are stored as the module holds them.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, QuantScheme]
    call: Call
    alone: Call
    rows: int = 1 << 30
    stored: Stored | None = None

    def local(self, layer: str) -> str:
        """The name of a layer within the block."""
        return layer.removeprefix(inside(self.name))

    def full(self, local: str) -> str:
        """The name in the model of what the block calls ``local``."""
        return inside(self.name) + local

    def stored_in(self, parameter: str) -> torch.dtype:
        """The dtype that a parameter, by its name within the block, is stored in if it is not quantized."""
        name = self.full(parameter)
        return self.stored.dtype(name) if self.stored is not None else torch.float32

    def run(self, batch: Batch, module: nn.Module | None = None, again: Callable[[], None] | None = None) -> Tensor:
        """The output of the block.

        ``accelerate.utils.find_executable_batch_size`` is not used: it hides the error of the last attempt, and would begin anew
        with every batch, where ``rows`` stays small for the rest of the block.

        Args:
            batch: With hidden states ``[B, T, d]``; the output has the same shape.
            module: To run in place of `module`, if given.
            again: Called when memory has run out and the run is repeated one sequence at a time, so that hooks can drop what they
                have collected.
        """
        while True:
            try:
                parts = (
                    [batch.states]
                    if batch.undivided or self.rows >= len(batch.states)
                    else batch.states.split(self.rows)
                )
                outputs = [self._run(batch._replace(states=part), module or self.module) for part in parts]
                return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
            except RuntimeError as error:
                if batch.undivided or not _out_of_memory(error) or min(self.rows, len(batch.states)) == 1:
                    raise
                self.rows = 1
                if again is not None:
                    again()

    def sample(self, batch: Batch, module: nn.Module | None = None) -> Tensor:
        """The output for the first sequence of a batch, or for a batch that has arguments of its own."""
        if batch.undivided:
            return self._run(batch, module or self.module)
        return self._run(batch._replace(states=batch.states[:1]), module or self.module)

    def _run(self, batch: Batch, module: nn.Module) -> Tensor:
        hidden = batch.states
        args, kwargs = batch.call or (self.alone if len(hidden) == 1 else self.call)
        out = module(hidden.to(next(module.parameters()).device), *args, **kwargs)
        if batch.carry is not None:
            batch.carry(out)
        return states_of(self.name, out)


def inside(block: str) -> str:
    """What the names of a block's parts begin with; nothing for a whole model."""
    return f"{block}." if block else ""


def states_of(name: str, out: Any) -> Tensor:
    """The hidden states in the output of a block: the output itself, or its first element; of a whole model, however deep.

    Raises:
        UnchainedError: There are none; names the block.
    """
    states = out
    while isinstance(states, tuple | list) and states and (states is out or not name):
        states = states[0]
    if not isinstance(states, Tensor):
        raise UnchainedError(
            f"{name}: returns {type(out).__name__}, and only hidden states [B, T, d] can be calibrated yet"
        )
    return states


def use(block: Block, codes: Mapping[str, QuantizedTensor]) -> None:
    """Replace the weights of layers by their dequantized codes."""
    for name, quantized in codes.items():
        put(block, name, quantized.dequantize(torch.float32))


def put(block: Block, name: str, real: Tensor) -> None:
    """Replace the weight of a layer, or a stack of experts, by ``real`` ``[N, K]`` or ``[E, N, K]``."""
    parameter, geometry = parameter_of(block, name)
    parameter.data.copy_(geometry.weight(real))


def parameter_of(block: Block, name: str) -> tuple[nn.Parameter, Geometry]:
    """The parameter that holds the weight of a layer, or a stack of experts, and its geometry."""
    return parameter_in(block.module, block.local(name))


def parameter_in(root: nn.Module, name: str) -> tuple[nn.Parameter, Geometry]:
    """`parameter_of` by the name inside of ``root``, which may be a whole model."""
    path, _, leaf = name.rpartition(".")
    parent: Any = root.get_submodule(path)
    if leaf in stacks(parent):
        return getattr(parent, leaf), geometry_of(parent)
    module: Any = root.get_submodule(name)
    return module.weight, geometry_of(module)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
