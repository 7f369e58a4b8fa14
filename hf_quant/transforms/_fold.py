"""Scaling the input columns of a stage, and taking the scales back where that input is made: the function stays.

Scales are powers of two, so that dividing a norm's weights, a layer's rows or the scales of codes by them is exact in any
floating-point format.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.transforms import Stage, weight_of

PAIRS = {
    "o_proj": "v_proj",
    "down_proj": "up_proj",
    "w2": "w3",
    "out_proj": "v_proj",
}  # consumer: producer, row by row
CLOSE = 1e-3  # largest relative change of the block's output taken for rounding


def powers_of_two(scales: Tensor) -> Tensor:
    """The nearest ones, within 2^-12 .. 2^12 of each other's middle."""
    log = scales.clamp(min=1e-30).log2()
    return torch.exp2((log - log.median()).round().clamp(-12, 12))


def fold(stage: Stage, scales: Tensor) -> str | None:
    """Multiply the stage's columns by ``scales [K]`` and divide what makes its input, in both blocks.

    Returns:
        None, or a sentence why not; then nothing has changed.
    """
    producer = _producer(stage)
    if producer is None:
        return "nothing before it can take the scales"
    shared = _shared(stage, producer, scales)
    if shared is None:
        return f"{producer} has fewer rows than this has columns"
    judge = stage.twin or stage.block
    before = stage.probe(judge)
    _scale(stage, producer, shared)
    after = stage.probe(judge)
    if (after - before).norm() > CLOSE * before.norm():
        _scale(stage, producer, shared.reciprocal())
        return f"the output of {producer} is used elsewhere too"
    return None


def _producer(stage: Stage) -> str | None:
    """Local name of a norm, or of a layer whose rows are the stage's columns."""
    width = stage.stats.gram.shape[0]
    if stage.source is not None:
        weight = getattr(stage.block.get_submodule(stage.source), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1 and weight.numel() == width:
            return stage.source
    first = next(iter(stage.layers))
    path, _, leaf = first.rpartition(".")
    name = f"{path}.{PAIRS.get(leaf)}".lstrip(".")
    return name if any(name == found for found, _ in stage.block.named_modules()) else None


def _shared(stage: Stage, producer: str, scales: Tensor) -> Tensor | None:
    """Where several heads read the same rows (grouped-query attention), one scale for all of them."""
    module: Any = stage.block.get_submodule(producer)
    rows = module.weight.shape[0] if module.weight.ndim == 1 else weight_of(module).shape[0]
    if rows == scales.numel():
        return scales
    parent: Any = stage.block.get_submodule(producer.rpartition(".")[0])
    head = getattr(parent, "head_dim", None)
    if not isinstance(head, int) or rows % head or scales.numel() % rows:
        return None
    by_head = scales.view(rows // head, -1, head)
    return powers_of_two(by_head.log2().mean(1, keepdim=True).exp2()).expand_as(by_head).reshape(-1)


def _scale(stage: Stage, producer: str, scales: Tensor) -> None:
    for block in stage.blocks:
        module: Any = block.get_submodule(producer)
        rows = module.weight.shape[0] if module.weight.ndim == 1 else weight_of(module).shape[0]
        own = _per_row(scales, rows, block.get_submodule(producer.rpartition(".")[0])).to(module.weight.dtype)
        if module.weight.ndim == 1:
            module.weight.data.div_(own)
        else:
            weight_of(module).div_(own[:, None])
        if getattr(module, "bias", None) is not None:
            module.bias.data.div_(own.to(module.bias.dtype))
        for name in stage.layers:
            weight_of(block.get_submodule(name)).mul_(scales.to(module.weight.dtype))
    if producer in stage.codes:
        stage.codes[producer] = _divided(stage.codes[producer], own)
    _rescale(stage, scales)


def _per_row(scales: Tensor, rows: int, parent: nn.Module) -> Tensor:
    if rows == scales.numel():
        return scales
    head: Any = parent.head_dim
    return scales.view(rows // head, -1, head)[:, 0].reshape(-1)


def _divided(codes: Any, own: Tensor) -> Any:
    """Rows of codes divided by powers of two: only their scales and outliers change."""
    outliers = codes.outliers
    if outliers is not None:
        outliers = replace(outliers, value=outliers.value / own[:, None].to(outliers.value))
    return replace(codes, scale=codes.scale / own[:, None].to(codes.scale), outliers=outliers)


def _rescale(stage: Stage, scales: Tensor) -> None:
    """The statistics of inputs that are divided by ``scales``."""
    stats = stage.stats
    both = (scales[:, None] * scales).to(stats.gram.dtype)
    stats.gram.div_(both)
    if stats.drift is not None:
        stats.drift.div_(both)
    stats.held = [(x / scales, off / scales) for x, off in stats.held]
    stats.forget()
