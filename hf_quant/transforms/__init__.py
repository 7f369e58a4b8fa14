"""Transforms: what is done to a block's weights before they are rounded. One file each; any of them goes with any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_quant import _plugins
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor


@dataclass
class Stage:
    """The layers of one block that are given the same tensor, about to be quantized.

    Attributes:
        block: Its layers of earlier stages are quantized already.
        twin: The same block in floating point; None where no transform asks for it.
        layers: Local name of each layer of this stage, to its scheme.
        stats: Of the input they share.
        source: Local name of the module whose output that input is; None if it is no module's.
        codes: Of the block's layers quantized so far, by local name.
        probe: Runs one of the two blocks on a few tokens.
        stored: Tells what a parameter of that local name is stored in, where it is not quantized.
        notes: What is worth reporting.
    """

    block: nn.Module
    twin: nn.Module | None
    layers: Mapping[str, QuantScheme]
    stats: InputStats
    source: str | None
    codes: MutableMapping[str, QuantizedTensor]
    probe: Callable[[nn.Module], Tensor]
    stored: Callable[[str], torch.dtype] = lambda _name: torch.float32
    notes: list[str] = field(default_factory=list)

    @property
    def blocks(self) -> list[nn.Module]:
        """Both, where there are two."""
        return [self.block] if self.twin is None else [self.block, self.twin]

    def weight(self, name: str) -> Tensor:
        """``[N, K]`` of a layer of this block, in its dtype."""
        return weight_of(self.block.get_submodule(name))


@runtime_checkable
class Transform(Protocol):
    """Rewrites weights of a stage (and of what comes before it). Instances are frozen dataclasses of hyperparameters.

    Attributes:
        needs_twin: Whether it looks at the float model's own activations.
        shared: Whether it scales columns that all layers of a stage share, and so changes them all.
    """

    needs_twin: ClassVar[bool]
    shared: ClassVar[bool]

    def apply(self, stage: Stage) -> list[str]:
        """Change the weights of ``stage.block`` and, so that both stay comparable, of ``stage.twin``.

        Returns:
            Local names of the layers whose own function it changed; none where it was better to do nothing, or not possible.
        """
        ...


def transform(name: str, **hyperparameters: object) -> Transform:
    """Build a transform by file name: ``transform("awq")``."""
    made: Transform = _plugins.load("transforms", name).TRANSFORM(**hyperparameters)
    return made


def weight_of(module: Any) -> Tensor:
    """``[N, K]``, a view; also of a ``Conv1D``, which holds its transpose."""
    weight: Tensor = module.weight.data
    return weight if isinstance(module, nn.Linear) else weight.T
