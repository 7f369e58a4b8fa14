"""One block of a model at a time: see its inputs, round its weights, and hand its new outputs to the next one.

`nn.Module` blocks come in from above, and batches of hidden states walk up through them; the model never exists whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.errors import HfQuantError
from hf_quant.methods import Method
from hf_quant.scheme import QuantScheme
from hf_quant.stats import InputStats
from hf_quant.tensor import QuantizedTensor

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        name: ``"model.layers.3"``.
        module: In memory while it is worked on.
        layers: Full name of each linear layer to quantize, to its scheme.
        call: What the block takes besides hidden states; the same for all batches.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, QuantScheme]
    call: Call

    def local(self, layer: str) -> str:
        """A layer's name inside the block."""
        return layer.removeprefix(f"{self.name}.")

    def run(self, hidden: Tensor) -> Tensor:
        """The block's output, ``[B, T, d]`` as its input."""
        out = self.module(hidden, *self.call[0], **self.call[1])
        return out[0] if isinstance(out, tuple) else out


@dataclass
class Solved:
    """What became of one block.

    Attributes:
        codes: Full name of each layer to its codes.
        errors: To the squared error of the layer's output over its squared output.
        notes: To what the method wants reported.
        error: Of the block's output likewise, all its layers quantized.
    """

    codes: dict[str, QuantizedTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    error: float = 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise of the block's output; None where there is no noise."""
        return -10 * math.log10(self.error) if self.error else None


@torch.inference_mode()
def solve(block: Block, batches: list[Tensor], method: Method, dtype: torch.dtype) -> Solved:
    """Quantize a block's layers, leave it computing with the result, and replace ``batches`` by its outputs.

    Args:
        block: In floating point.
        batches: Its inputs, ``[B, T, d]`` each.
        method: How codes are chosen.
        dtype: What scales are stored in.

    Raises:
        HfQuantError: An output is NaN or infinite; names the block.
    """
    stats: dict[str, InputStats] = {}
    made, wanted = Solved(), []
    with _watching(block, stats):
        for batch in batches:
            wanted.append(block.run(batch))
    for name, scheme in block.layers.items():
        weight = _weight(block, name)
        if name not in stats:
            raise HfQuantError(f"{name} saw no tokens")
        made.codes[name] = method.quantize(weight, scheme, dtype, stats[name])
        real = made.codes[name].dequantize(torch.float32)
        made.errors[name] = stats[name].error(weight, real)
        if stats[name].notes:
            made.notes[name] = list(stats[name].notes)
            stats[name].notes.clear()
    use(block, made.codes)
    lost = whole = 0.0
    for i, (batch, before) in enumerate(zip(list(batches), wanted, strict=True)):
        batches[i] = block.run(batch)
        lost += (batches[i] - before).double().square().sum().item()
        whole += before.double().square().sum().item()
    made.error = lost / whole if whole else 0.0
    _check(block, batches)
    return made


@torch.inference_mode()
def advance(block: Block, batches: list[Tensor]) -> None:
    """Replace ``batches`` by the block's outputs."""
    for i, batch in enumerate(batches):
        batches[i] = block.run(batch)
    _check(block, batches)


def use(block: Block, codes: Mapping[str, QuantizedTensor]) -> None:
    """Let the block's layers compute with what their codes mean."""
    for name, quantized in codes.items():
        layer: Any = block.module.get_submodule(block.local(name))
        real = quantized.dequantize(torch.float32)
        layer.weight = nn.Parameter((real if isinstance(layer, nn.Linear) else real.T).to(layer.weight.dtype), False)


def _weight(block: Block, name: str) -> Tensor:
    """``[N, K]``, also of a ``Conv1D``, which holds its transpose."""
    layer: Any = block.module.get_submodule(block.local(name))
    weight: Tensor = layer.weight.data
    return weight if isinstance(layer, nn.Linear) else weight.T


@contextmanager
def _watching(block: Block, stats: dict[str, InputStats]) -> Iterator[None]:
    """Fill ``stats`` while the block runs; layers that are given the very same tensor share one entry."""
    leader: dict[str, str] = {}
    last: list[Any] = [None, ""]  # the input seen last, and by which layer

    def hook(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0] is not last[0]:
                last[:] = args[0], name
            if leader.setdefault(name, last[1]) != name:
                stats[name] = stats[leader[name]]
                return
            stats.setdefault(name, InputStats.empty(args[0].shape[-1], args[0].device)).update(args[0])

        return look

    handles = [block.module.get_submodule(block.local(n)).register_forward_pre_hook(hook(n)) for n in block.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(block: Block, batches: Sequence[Tensor]) -> None:
    if not all(batch.isfinite().all() for batch in batches):
        raise HfQuantError(f"{block.name}: its outputs on the calibration text are NaN or infinite")
