"""Rotation of each attention head's values by a Hadamard matrix, folded into the weights: the value part of QuaRot
(arXiv:2404.00456) and SpinQuant's R2 (arXiv:2405.16406)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_quant.core.geometry import weight_of
from hf_quant.transforms import Stage
from hf_quant.transforms._judge import changed

VALUES, OUTPUT = "v_proj", ("o_proj", "out_proj")


@dataclass(frozen=True)
class Hadamard:
    """Applied to the layer of the values: its rows are rotated, and the columns of the output layer are rotated back."""

    needs_twin: ClassVar[bool] = False
    shared: ClassVar[bool] = False

    def apply(self, stage: Stage) -> list[str]:
        values = next((name for name in stage.layers if name.rpartition(".")[2] == VALUES), None)
        if values is None:
            return []
        path = values.rpartition(".")[0]
        attention: Any = stage.block.get_submodule(path)
        output = next((name for name in OUTPUT if hasattr(attention, name)), None)
        head = getattr(attention, "head_dim", None)
        if output is None or not isinstance(head, int) or head & (head - 1):
            stage.notes.append("hadamard: no output layer, or heads whose width is not a power of two")
            return []
        H, reader = hadamard(head), f"{path}.{output}".lstrip(".")
        if stage.convolution(values, reader) is not None:
            stage.notes.append("hadamard: values or output are a convolution")
            return []
        if changed(stage, values, lambda out: _by_head(out, H.T), [reader], lambda x: _by_head(x, H)) is not None:
            stage.notes.append("hadamard: more than a product lies between values and output")
            return []
        for block in stage.blocks:
            _turn(block.get_submodule(values), block.get_submodule(reader), H)
        return [values, reader]


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix, orthogonal: float32 ``[size, size]``, for a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def _by_head(x: Tensor, H: Tensor) -> Tensor:
    """``x [..., heads * size]`` with the part of each head multiplied by ``H`` from the right."""
    return (x.unflatten(-1, (-1, H.shape[0])) @ H.to(x)).flatten(-2)


def _turn(values: nn.Module, output: nn.Module, H: Tensor) -> None:
    """Rotate the rows of ``values`` head by head, and the columns of ``output`` back."""
    rows, columns = weight_of(values), weight_of(output)
    rows.copy_(_by_head(rows.T, H.T).T)
    columns.copy_(_by_head(columns, H.T))
    bias: Any = getattr(values, "bias", None)
    if bias is not None:
        bias.data.copy_(_by_head(bias.data, H.T))


TRANSFORM = Hadamard
