"""What the routing of experts and the products with INT8 activations compute, in plain loops: what their tests compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_quant.core.tensor import QuantizedTensor


def by_expert(chosen: Tensor, experts: int) -> tuple[list[int], list[int]]:
    """`routing.by_expert`: where the rows of each expert end, and the number of each choice in that order."""
    picks = chosen.flatten().tolist()
    ends: list[int] = []
    order: list[int] = []
    for expert in range(max([experts, *(pick + 1 for pick in picks)])):  # those of other devices come last
        order += [choice for choice, pick in enumerate(picks) if pick == expert]
        ends.append(len(order))
    return ends[:experts], order


def cut(ends: list[int], size: int) -> list[tuple[int, int, int]]:
    """`routing.cut`: tiles of up to ``size`` rows of one expert each, as (expert, first row, end of the expert's rows)."""
    tiles, first = [], 0
    for expert, end in enumerate(ends):
        tiles += [(expert, row, end) for row in range(first, end, size)]
        first = end
    return tiles


def rounded_row(row: list[float], columns: set[int], scale: float | None) -> tuple[list[int], float]:
    """INT8 codes of the activations of one row, and their scale.

    Args:
        row: K activations.
        columns: Those that are left out, as zeros.
        scale: The fixed scale; None for the largest activation over 127.
    """
    kept = [0.0 if column in columns else x for column, x in enumerate(row)]
    if scale is None:
        scale = max(map(abs, kept)) / 127 or 1.0
    return [max(-127, min(127, math.floor(x / scale + 0.5))) for x in kept], scale


def int8_linear(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """``x [M, K]`` rounded to INT8, times the codes of ``weight``: ``[M, N]`` in float64.

    Products are added up in integers within a group. Outliers are no part of it: they are multiplied in floating point.
    """
    n, k = weight.scale.shape[0], weight.in_features
    codes, zeros, scales = weight.codes().long(), weight.zeros().long(), weight.scale.double()
    left_out = weight.outliers.index.tolist() if weight.outliers and weight.scheme.outlier_columns else []
    fixed = None if weight.input_scale is None else float(weight.input_scale)
    groups, y = weight.scale.shape[1], torch.zeros(x.shape[0], n, dtype=torch.float64)
    for i, row in enumerate(x.double().tolist()):
        rounded, row_scale = rounded_row(row, set(left_out), fixed)
        for g in range(groups):
            total = torch.zeros(n, dtype=torch.int64)
            for column in range(g * k // groups, (g + 1) * k // groups):
                total += rounded[column] * (codes[:, column] - zeros[:, g])
            y[i] += total.double() * scales[:, g] * row_scale
    return y
