"""Formats: how a `QuantizedTensor` is laid out in a checkpoint. One file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_quant import _plugins
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import QuantizedTensor


@runtime_checkable
class Format(Protocol):
    """Reads and writes the tensors of one linear layer, under their local names."""

    suffixes: ClassVar[tuple[str, ...]]

    def why_not(self, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold ``scheme``, or None if it can."""
        ...

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Local name to (shape, dtype) of what `write` gives for a weight ``[N, K]`` with scales in ``dtype``."""
        ...

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Local name to tensor, for example ``{"weight_packed": ...}``; no copy where a view will do."""
        ...

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """Inverse of `write`; raises FormatError on a missing, misshapen or out-of-range tensor."""
        ...


def format_named(name: str) -> Format:
    """The format in the file of that name: ``format_named("native")``."""
    made: Format = _plugins.load("formats", name).FORMAT()
    return made
