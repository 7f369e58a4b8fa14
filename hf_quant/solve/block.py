"""One decoder layer while it is worked on: what it computes, and how codes take the place of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import HfQuantError
from hf_quant.nn.experts import stacks
from hf_quant.transforms import weight_of

Call = tuple[tuple[Any, ...], dict[str, Any]]


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


def use(block: Block, codes: Mapping[str, QuantizedTensor]) -> None:
    """Let the block's layers compute with what their codes mean."""
    for name, quantized in codes.items():
        put(block, name, quantized.dequantize(torch.float32))


def put(block: Block, name: str, real: Tensor) -> None:
    """Replace the weight of one layer, or a stack, by ``real`` ``[N, K]`` or ``[E, N, K]``."""
    local = block.local(name)
    path, _, leaf = local.rpartition(".")
    parent: Any = block.module.get_submodule(path)
    if leaf in stacks(parent):
        stack: Tensor = getattr(parent, leaf).data
        stack.copy_(real.transpose(-1, -2) if parent.is_transposed else real)
    else:
        weight_of(block.module.get_submodule(local)).copy_(real)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
