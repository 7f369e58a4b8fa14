"""Methods: how the codes of one weight matrix are chosen. One file each."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_quant import _plugins
from hf_quant.core.numerics import padded
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor


@runtime_checkable
class Method(Protocol):
    """Quantizes one weight matrix. Instances are frozen dataclasses of hyperparameters.

    Attributes:
        calibrated: Whether it needs statistics of the layer's inputs.
        two_levels: Whether it makes K-quants too; missing means no.
    """

    calibrated: ClassVar[bool]

    def quantize(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, stats: InputStats | None = None
    ) -> QuantizedTensor:
        """Quantize ``weight`` ``[N, K]``, which is not changed; scales are stored in ``dtype``.

        It never meets padding: `quantize` below puts the zero columns there first.

        Raises:
            HfQuantError: The method is calibrated, and there are no statistics.
        """
        ...


def method(name: str, **hyperparameters: object) -> Method:
    """Build a method by file name: ``method("rtn", steps=0)``."""
    loaded: Method = _plugins.load("methods", name).METHOD(**hyperparameters)
    return loaded


def quantize(
    chosen: Method, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, stats: InputStats | None = None
) -> QuantizedTensor:
    """The codes that a method chooses for ``weight`` ``[N, K]``, padded where ``scheme`` says so; arguments as of `Method.quantize`."""
    if not scheme.padding:
        return chosen.quantize(weight, scheme, dtype, stats)
    wide = None if stats is None else stats.padded(scheme.padding)
    return replace(chosen.quantize(padded(weight, scheme), scheme.stored, dtype, wide), scheme=scheme)
