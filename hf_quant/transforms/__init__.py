"""Transforms: how the weights of a block are changed before rounding. One file each; any transform goes with any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_quant import _plugins
from hf_quant.core.geometry import Patches, geometry_of, weight_of
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor


@dataclass
class Stage:
    """The layers of a block that share an input, before they are quantized.

    Attributes:
        block: The block; its layers of earlier stages are already quantized.
        twin: The same block in floating point; None if no transform needs it.
        layers: Local name of each layer of this stage, to its scheme.
        stats: Statistics of the shared input.
        source: Local name of the module whose output the input is; None if it is not the output of a module.
        codes: Codes of the layers quantized so far, by local name.
        probe: Runs one of the two blocks on a few tokens.
        stored: The dtype that a parameter, by local name, is stored in if it is not quantized.
        notes: Remarks to report.
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
        """The block, and its twin if there is one."""
        return [self.block] if self.twin is None else [self.block, self.twin]

    def convolution(self, *names: str) -> str | None:
        """The first of these modules of the block that is a convolution, whose input and output are not rows; None if none is."""
        modules = ((name, self.block.get_submodule(name)) for name in names)
        return next((name for name, module in modules if isinstance(geometry_of(module), Patches)), None)

    def weight(self, name: str) -> Tensor:
        """The weight ``[N, K]`` of a layer of this block, in its dtype."""
        return weight_of(self.block.get_submodule(name))


@runtime_checkable
class Transform(Protocol):
    """Rewrites the weights of a stage and of the module before it. Instances are frozen dataclasses of hyperparameters.

    Attributes:
        needs_twin: Whether it needs the hidden states of the float model.
        shared: Whether it scales columns that all layers of a stage share, and so changes all of them.
    """

    needs_twin: ClassVar[bool]
    shared: ClassVar[bool]

    def apply(self, stage: Stage) -> list[str]:
        """Change the weights of ``stage.block``, and in the same way those of ``stage.twin``.

        Returns:
            Local names of the layers that now compute another function; empty if nothing was changed.
        """
        ...


def transform(name: str, **hyperparameters: object) -> Transform:
    """Build a transform by file name: ``transform("awq")``."""
    loaded: Transform = _plugins.load("transforms", name).TRANSFORM(**hyperparameters)
    return loaded
