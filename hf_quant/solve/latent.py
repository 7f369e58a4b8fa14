"""One weight matrix, or a stack of them, while its codes and scales are learned."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_quant.core.numerics import floored, grouped, padded
from hf_quant.core.packing import pack
from hf_quant.core.tensor import Outliers, QuantizedTensor

EDGE = 0.45  # of a step at most is a weight away from its code, so that rounding gives that code
NEAR = 0.5  # and half as far as that in the beginning
UNIT = EDGE * NEAR / 127  # of what is kept until learning starts, which takes a quarter of the memory of float32


def offset_of(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """From each code half way to its weight, or to the edge of its code if it has been given another one than the nearest.

    That is a quarter of the codes that GPTQ chooses at 2 bits, and they make up for one another: at the edge itself the first few
    steps would round all of them back.

    Args:
        weight: ``[..., N, K]``, what was quantized.
        quantized: Its codes.

    Returns:
        int8 ``[..., N, G, K/G]``, in `UNIT` of a step; does not change where columns or rows are scaled afterwards.
    """
    device = weight.device
    scale, zero = (tensor.to(device).float()[..., None] for tensor in (quantized.scale, quantized.zeros()))
    away = (grouped(weight.float(), quantized.scheme) / scale).add_(zero).sub_(_codes_of(quantized, device))
    return away.clamp_(-EDGE, EDGE).mul_(NEAR / UNIT).round_().to(torch.int8)


def _codes_of(quantized: QuantizedTensor, device: torch.device) -> Tensor:
    """float32 ``[..., N, G, K/G]``."""
    return quantized.codes().to(device).float().unflatten(-1, (quantized.scale.shape[-1], -1))


class Latent:
    """Real numbers that become codes when they are rounded, and scales as multiples of those learning starts from.

    ``w = (round(place) - zero_point) * scale * factor``. Gradients pass straight through both roundings, of codes to whole
    numbers and of scales to what is stored (arXiv:1308.3432; of codes and scales together: LSQ, arXiv:1902.08153, and
    EfficientQAT, arXiv:2407.11062). Zero points and outliers stay as they are.

    Args:
        start: What learning starts from.
        offset: As `offset_of` gives it.

    Attributes:
        place: float32 ``[..., N, G, K/G]``, from 0 to the largest code.
        factor: float32 ``[..., N, G, 1]``.
    """

    def __init__(self, start: QuantizedTensor, offset: Tensor) -> None:
        self.start = start
        self.device = device = offset.device
        self.place = nn.Parameter(_codes_of(start, device).add_(offset, alpha=UNIT))
        self.keep_inside()
        self.factor = nn.Parameter(torch.ones(*start.scale.shape, 1, dtype=torch.float32, device=device))
        self._scale = start.scale.to(device).float()[..., None]
        self._zero = start.zeros().to(device).float()[..., None]
        self._coded: Tensor | None = None
        if start.outliers is not None:
            index = start.outliers.index.long()
            index = index if index.ndim == start.scale.ndim else index[..., None, :]
            mask = torch.ones(*start.scale.shape[:-1], start.columns, dtype=torch.float32, device=device)
            self._coded = mask.scatter_(-1, index.to(device).expand(start.outliers.value.shape), 0).view_as(self.place)

    def weight(self) -> Tensor:
        """What the codes mean now: float32 ``[..., N, K]``."""
        weight = self._codes().sub_(self._zero).mul_(self._stored()).flatten(-2)
        outliers = self.start.outliers
        if outliers is not None:
            weight = Outliers(outliers.index.to(self.device), outliers.value.to(self.device)).add_to(weight)
        return weight[..., : self.start.in_features]

    def take(self, gradient: Tensor) -> None:
        """Hand on the gradient of `weight` ``[..., N, K]``."""
        steps = padded(gradient, self.start.scheme).view_as(self.place)
        if self._coded is not None:
            steps = steps * self._coded
        self.place.grad = steps * self._stored()
        self.factor.grad = self._codes().sub_(self._zero).mul_(steps).sum(-1, keepdim=True) * self._scale

    def keep_inside(self) -> None:
        """After a step: no place beyond the grid, where it would take many more to come back."""
        self.place.data.clamp_(0, self.start.scheme.qmax)

    def quantized(self) -> QuantizedTensor:
        """As it is stored, in main memory."""
        codes = self._codes().flatten(-2).to(torch.uint8).cpu()
        scale = self._stored().squeeze(-1).to(self.start.scale.dtype).cpu()
        return replace(self.start, qweight=pack(codes, self.start.scheme.bits), scale=scale)

    def _codes(self) -> Tensor:
        codes = self.place.data.round().clamp_(0, self.start.scheme.qmax)
        return codes if self._coded is None else torch.where(self._coded.bool(), codes, self._zero)

    def _stored(self) -> Tensor:
        return floored(self._scale * self.factor.data, self.start.scale.dtype)
