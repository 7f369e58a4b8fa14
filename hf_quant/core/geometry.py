"""How a layer's float weight, inputs and outputs relate to the product ``x @ W.T`` of rows ``x [..., K]`` with a matrix ``W [N, K]``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Geometry:
    """Of a linear layer: weight, inputs and outputs are those of the product."""

    def matrix(self, weight: Tensor) -> Tensor:
        """The view ``[..., N, K]`` of a weight that is shaped as the layer has it."""
        return weight

    def weight(self, matrix: Tensor) -> Tensor:
        """The view of a matrix ``[..., N, K]`` that is shaped as the layer has it."""
        return matrix

    def rows(self, x: Tensor) -> Tensor:
        """The rows ``[..., K]`` in the input of the layer."""
        return x

    def with_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """The input of the layer with other rows."""
        return rows

    def input(self, rows: Tensor) -> Tensor:
        """An input of the layer with these rows ``[B, R, K]``."""
        return rows

    def output(self, y: Tensor) -> Tensor:
        """The output of the layer, from the product ``[..., N]``."""
        return y


class Transposed(Geometry):
    """Of a layer whose weight is ``[K, N]``: GPT-2's ``Conv1D``, and some stacks of experts."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def weight(self, matrix: Tensor) -> Tensor:
        return matrix.mT


@dataclass(frozen=True)
class Patches(Geometry):
    """Of a convolution over patches that do not overlap: a linear map of each patch.

    Its weight is ``[N, C, *kernel]`` and its input ``[..., C, *size]``; a row is a patch ``[C, *kernel]``, so that K is their product.

    Attributes:
        channels: C.
        kernel: Points of a patch along each axis.
        stride: From one patch to the next, along each axis; at least ``kernel``.
    """

    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def columns(self) -> int:
        """K."""
        return self.channels * math.prod(self.kernel)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, (self.channels, *self.kernel))

    def rows(self, x: Tensor) -> Tensor:
        return self._patches(x).flatten(-len(self.kernel) - 1)

    def with_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        changed = x.clone()
        patches = self._patches(changed)
        patches.copy_(rows.view(patches.shape))
        return changed

    def input(self, rows: Tensor) -> Tensor:
        size = (rows.shape[1] * self.stride[0], *self.kernel[1:])
        return self.with_rows(rows.new_zeros(len(rows), self.channels, *size), rows)

    def output(self, y: Tensor) -> Tensor:
        image = y.movedim(-1, -len(self.kernel) - 1)
        return image.contiguous()  # as a convolution returns it: models call view() on it

    def _patches(self, x: Tensor) -> Tensor:
        """The view ``[..., *patches, C, *kernel]`` of an input."""
        axes, channels = len(self.kernel), x.ndim - len(self.kernel) - 1
        for axis, (size, step) in enumerate(zip(self.kernel, self.stride, strict=True), channels + 1):
            x = x.unfold(axis, size, step)
        return x.movedim(channels, channels + axes)


PLAIN, TRANSPOSED = Geometry(), Transposed()


def patches_of(module: nn.Module) -> Patches | None:
    """The geometry of a convolution over patches that do not overlap; None if ``module`` is something else."""
    if not isinstance(module, CONVOLUTIONS):
        return None
    apart = all(size <= step for size, step in zip(module.kernel_size, module.stride, strict=True))
    padded = module.padding != "valid" and (isinstance(module.padding, str) or any(module.padding))
    dilated = any(step > 1 for size, step in zip(module.kernel_size, module.dilation, strict=True) if size > 1)
    parametrized = "weight" not in module._parameters
    if not apart or padded or dilated or module.groups > 1 or parametrized:
        return None
    return Patches(module.in_channels, tuple(module.kernel_size), tuple(module.stride))


def geometry_of(module: Any) -> Geometry:
    """The geometry of a module that multiplies by one weight, or by stacked experts; in floating point or quantized."""
    known = getattr(module, "geometry", None)
    if isinstance(known, Geometry):
        return known
    if (transposed := getattr(module, "is_transposed", None)) is not None:
        return TRANSPOSED if transposed else PLAIN
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Linear | nn.Embedding):
        return TRANSPOSED
    return patches_of(module) or PLAIN


def weight_of(module: Any) -> Tensor:
    """The weight ``[N, K]`` of a layer in floating point, as a view."""
    weight: Tensor = module.weight.data
    return geometry_of(module).matrix(weight)
