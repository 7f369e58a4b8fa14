"""Rounding to the nearest code on the best grid, by compiled code where there is any: bit for bit what `numerics` computes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hf_quant import _upwards
from hf_quant.core import numerics, packing
from hf_quant.core.scheme import MULTIPLE, QuantScheme
from hf_quant.core.two_levels import Base
from hf_quant.errors import SchemeError

ALIGNED = 64  # rows of columns side by side that PyTorch sums in the same order wherever they stand


def search(
    groups: Tensor, scheme: QuantScheme, dtype: torch.dtype, steps: int, least: float, importance: Tensor | None = None,
    base: Base | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result of `numerics.search`, to the last bit; its arguments, but groups may be of any floating-point dtype."""
    compiled = _upwards.rounding()
    if not compiled.takes(groups, scheme, dtype):
        return numerics.search(groups.float(), scheme, dtype, steps, least, importance, base)
    scale, zero, doubtful = compiled.search(groups, scheme, dtype, _shares(steps, least), importance)
    index = doubtful.nonzero(as_tuple=True)
    if count := len(index[0]):  # about one group in a thousand, whose two best ranges differ by the rounding of sums
        picked = groups[index].float()
        weights = None if importance is None else importance.expand_as(groups)[index]
        if groups.stride(-1) != 1:  # as groups of a transposed weight are summed
            picked, weights = _side_by_side(picked), None if weights is None else _side_by_side(weights)
        decided = numerics.search(picked, scheme, dtype, steps, least, weights)
        scale[index], zero[index] = (values[:count] for values in decided)
    return scale, zero


def encode(groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    """Packed codes of groups ``[..., G, S]`` of any floating-point dtype: uint8 ``[..., G S / 8 * bits]``.

    Scale and zero point are float32 ``[..., G, 1]``.

    Raises:
        SchemeError: The columns do not fill whole words.
    """
    columns = groups.shape[-2] * groups.shape[-1]
    if columns % MULTIPLE:
        raise SchemeError(f"in_features must be a multiple of {MULTIPLE}, got {columns}")
    compiled = _upwards.rounding()
    if compiled.takes(groups, scheme, scale.dtype):
        packed: Tensor = compiled.encode(groups, scale, zero, scheme)
        return packed
    codes = numerics.quantize(groups.float(), scale, zero, scheme).to(torch.uint8)
    return packing.pack(codes.flatten(-2), scheme.bits)


@lru_cache
def _shares(steps: int, least: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.linspace(1, least, steps, dtype=torch.float32)


def _side_by_side(rows: Tensor) -> Tensor:
    """``rows [M, S]`` with their columns contiguous, and copies of the first row up to a multiple of `ALIGNED`."""
    more = rows[:1].expand(-len(rows) % ALIGNED, -1)
    return torch.cat([rows, more]).t().contiguous().t()
