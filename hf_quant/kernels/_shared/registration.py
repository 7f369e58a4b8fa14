"""Checks of one argument of an operation at a time; `checks` combines them, and `ops` says which operation has which.

A kernel reads memory by address, so every tensor is checked before it: its device, dtype, shape and, where the kernel
wants it, contiguity. The message names the operation and the tensor. Values are read only where that waits for nobody:
on a CPU.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from hf_quant.core.scheme import WIDTHS
from hf_quant.errors import KernelError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODES = (torch.uint8,)
COLUMNS = (torch.int16, torch.int32, torch.int64)


class Arguments:
    """The arguments of one call.

    Args:
        op: Name of the operation.
        x: Its first tensor; all others must be on the same device.
    """

    __slots__ = ("device", "op")

    def __init__(self, op: str, x: Tensor) -> None:
        self.op, self.device = op, x.device

    def refuse(self, message: str) -> NoReturn:
        """End the call."""
        raise KernelError(f"{self.op}: {message}")

    def kind(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        """Check the device, layout and dtype of ``tensor``."""
        if tensor.device != self.device:
            self.refuse(f"{name} is on {tensor.device}, the first tensor on {self.device}: move them to one device")
        if tensor.layout is not torch.strided:
            self.refuse(f"{name} is {tensor.layout}, must be an ordinary (strided) tensor")
        if tensor.dtype not in dtypes:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            self.refuse(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, must be one of {wanted}")

    def tensor(
        self, name: str, tensor: Tensor | None, meaning: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...],
        *, contiguous: bool = False,
    ) -> None:  # fmt: skip
        """Check ``tensor``, where there is one; ``meaning`` says in letters what its shape must be."""
        if tensor is None:
            return
        self.kind(name, tensor, dtypes)
        if tensor.shape != shape:
            self.refuse(f"{name} has shape {list(tensor.shape)}, must be {meaning} = {list(shape)}")
        if contiguous and not tensor.is_contiguous():
            self.refuse(f"{name} is not contiguous: its strides are {list(tensor.stride())}")

    def axes(self, name: str, tensor: Tensor, meaning: str, count: int) -> tuple[int, ...]:
        """The shape of ``tensor``, which must have ``count`` axes."""
        shape = tuple(tensor.shape)
        if len(shape) != count:
            self.refuse(f"{name} has shape {list(shape)}, must be {meaning}")
        return shape

    def rows(self, x: Tensor, columns: int) -> None:
        """Check that ``x`` is ``[M, K]`` for a weight of K ``columns``."""
        self.kind("x", x, FLOATS)
        _, k = self.axes("x", x, "[M, K]", 2)
        if k != columns:
            self.refuse(f"x has {k} columns, the weight has {columns}")

    def bits(self, bits: int, allowed: tuple[int, ...] = WIDTHS) -> None:
        """Check the width of a code."""
        if bits not in allowed:
            self.refuse(f"bits must be one of {', '.join(map(str, allowed))}, got {bits}")

    def number(self, name: str, value: float, least: int, most: int) -> None:
        """Check a number, which must be from ``least`` to ``most``."""
        if not least <= value <= most:
            self.refuse(f"{name} must be from {least} to {most}, got {value}")

    def groups(self, groups: int, columns: int, multiple: int = 1) -> None:
        """Check that so many groups share out ``columns``, each a multiple of ``multiple``."""
        if groups < 1 or columns < 1 or columns % groups or columns // groups % multiple:
            of = f" of a multiple of {multiple} columns" if multiple > 1 else ""
            self.refuse(f"scale has {groups} groups, {columns} columns cannot be shared out among so many{of}")

    def columns(self, index: Tensor | None, columns: int) -> None:
        """Check a list of columns that are left out."""
        if index is not None:
            self.axes("columns", index, "[C]", 1)
            self.numbers("columns", index, columns)

    def numbers(self, name: str, index: Tensor, columns: int) -> None:
        """Check that every entry is the number of one of ``columns``."""
        self.kind(name, index, COLUMNS)
        if (message := outside(index, columns)) is not None:
            self.refuse(f"{name} {message}")

    def input_scale(self, scale: Tensor | None, name: str = "input_scale") -> None:
        """Check the one scale of all activations."""
        self.tensor(name, scale, "[1]", (1,), FLOATS)
        if scale is not None and scale.is_cpu and not 0 < float(scale) < torch.inf:
            self.refuse(f"{name} must be a finite number above 0, got {float(scale)}")


def outside(index: Tensor, columns: int) -> str | None:
    """What is wrong with numbers of columns that a kernel reads by; None where nothing is, or where a GPU holds them."""
    if not index.is_cpu or not index.numel():
        return None
    least, most = (int(end) for end in index.aminmax())
    if least >= 0 and most < columns:
        return None
    return f"names column {least if least < 0 else most}, there are columns 0 to {columns - 1}"
