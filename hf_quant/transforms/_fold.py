"""Scaling the input columns of a stage, and taking the scales back where that input is made: the function stays.

Scales are powers of two, so that dividing a layer's rows or the scales of codes by them is exact in any floating-point
format. What a norm's weight cannot take of them as it is stored, the columns take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.numerics import dequantize, quantize, search
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.transforms import Stage, weight_of
from hf_quant.transforms._judge import call_of, changed, close

PAIRS = {
    "o_proj": "v_proj",
    "down_proj": "up_proj",
    "w2": "w3",
    "out_proj": "v_proj",
}  # consumer: producer, row by row


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
    norm = stage.block.get_submodule(producer).weight.ndim == 1
    taken = _into_norm(stage, producer, shared) if norm else _into_layer(stage, producer, shared)
    if isinstance(taken, str):
        return f"{producer} {taken}"
    other = changed(
        stage, producer, lambda out: out / taken.rows.to(out), stage.layers, lambda x: x * taken.columns.to(x)
    )
    if other is not None:
        return f"the output of {producer} is used elsewhere too{f', by {other}' if other else ''}"
    for block in stage.blocks:
        module: Any = block.get_submodule(producer)
        module.weight.data.copy_(taken.weight)
        if taken.bias is not None:
            module.bias.data.copy_(taken.bias)
        for name in stage.layers:
            weight_of(block.get_submodule(name)).mul_(taken.columns)
    if taken.codes is not None:
        stage.codes[producer] = taken.codes
    _rescale(stage, taken.columns)
    return None


@dataclass(frozen=True)
class _Taken:
    """What becomes of a producer.

    Attributes:
        rows: What its output is divided by, one number for each of its rows.
        columns: float32 ``[K]``, what the columns of the stage are multiplied by.
        weight: Its new weight, as the module holds it.
        bias: Its new bias; None where it has none.
        codes: Its new codes; None where it has none.
    """

    rows: Tensor
    columns: Tensor
    weight: Tensor
    bias: Tensor | None
    codes: QuantizedTensor | None = None


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


def _into_norm(stage: Stage, producer: str, scales: Tensor) -> _Taken | str:
    """A norm that multiplies by ``c + weight``, whichever c: 1 in Gemma's, 0 in most others.

    The weight is rounded to what it is stored in; the columns take what that cannot hold.
    """
    module: Any = stage.block.get_submodule(producer)
    weight, bias, call = module.weight.data.clone(), getattr(module, "bias", None), call_of(stage, producer)
    offset = _offset(module, call)
    if offset is None:
        return "does not multiply by its weight, or by one more than that"
    gain = weight + offset
    rounded = (gain / scales.to(gain) - offset).to(stage.stored(f"{producer}.weight")).to(weight)
    share = gain / (rounded + offset)
    kept = ~((share > scales / 2) & (share < scales * 2))  # a gain of zero, or one too small for the type
    rounded, share = torch.where(kept, weight, rounded), torch.where(kept, torch.ones_like(share), share)
    moved = None if bias is None else (bias.data / share).to(stage.stored(f"{producer}.bias")).to(bias.data)
    before, old = call(), None if bias is None else bias.data.clone()
    _set(module, rounded, moved)
    after = call()
    _set(module, weight, old)
    if not isinstance(before, Tensor) or not close(before / share, after):
        return f"is stored in {stage.stored(f'{producer}.weight')}, which cannot hold it divided by the scales"
    return _Taken(share, share.float(), rounded, moved)


def _offset(module: Any, call: Callable[[], Any]) -> float | None:
    """The c of a norm's ``c + weight``, as its output shows; None where it computes in another way."""
    weight, bias = module.weight.data.clone(), getattr(module, "bias", None)
    old = None if bias is None else bias.data.clone()
    made = []
    for tried in (torch.zeros_like(weight), torch.ones_like(weight), weight):
        _set(module, tried, None if old is None else torch.zeros_like(old))
        made.append(call())
    _set(module, weight, old)
    if not all(isinstance(out, Tensor) for out in made):
        return None
    zero, one, out = made
    unit = one - zero  # what the weight is multiplied with
    size = float(unit.double().square().sum())
    offset = float(round(float((unit * zero).sum(dtype=torch.float64)) / size)) if size > 0 else 0.0
    return offset if size > 0 and close(unit * (weight + offset), out) and close(unit * (1 + offset), one) else None


def _set(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    module.weight.data.copy_(weight)
    if bias is not None:
        module.bias.data.copy_(bias)


def _into_layer(stage: Stage, producer: str, scales: Tensor) -> _Taken | str:
    """A linear layer, its rows divided; so are the scales of its codes, if it has been quantized."""
    module: Any = stage.block.get_submodule(producer)
    own = _per_row(scales, weight_of(module).shape[0], stage.block.get_submodule(producer.rpartition(".")[0]))
    bias, codes = getattr(module, "bias", None), stage.codes.get(producer)
    if codes is not None:
        codes = _divided(codes, own)
        exact = _exact(stage.codes[producer].scale, codes.scale, own[:, None])
    else:
        dtype = stage.stored(f"{producer}.weight")
        stored = weight_of(module).to(dtype)
        exact = _exact(stored, (stored.float() / own[:, None]).to(dtype), own[:, None])
    if not exact:
        return "is stored in a type that cannot hold it divided by the scales"
    weight = module.weight.data / (own[:, None] if isinstance(module, nn.Linear) else own)
    return _Taken(own, scales, weight, None if bias is None else bias.data / own, codes)


def _exact(before: Tensor, after: Tensor, by: Tensor) -> bool:
    return bool((after.float() * by == before.float()).all())


def _per_row(scales: Tensor, rows: int, parent: nn.Module) -> Tensor:
    if rows == scales.numel():
        return scales
    head: Any = parent.head_dim
    return scales.view(rows // head, -1, head)[:, 0].reshape(-1)


def _divided(codes: QuantizedTensor, own: Tensor) -> QuantizedTensor:
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
    stats.peak = stats.peak / scales
    stats.sample = [x / scales for x in stats.sample]
    if stats.drift is not None:
        stats.drift.div_(both)
    stats.held = [(x / scales, off / scales) for x, off in stats.held]
    stats.forget()


def rounding_error(weights: list[tuple[Tensor, QuantScheme]], gram: Tensor, scales: Tensor, steps: int) -> float:
    """Squared output error of layers that share their input, rounded to nearest with their columns scaled.

    Args:
        weights: float32 ``[N, K]`` each, with its scheme.
        gram: float32 ``[K, K]``, of the inputs before they are divided by the scales.
        scales: float32 ``[K]``.
        steps: Of the search for each group's range.
    """
    total = 0.0
    for W, scheme in weights:
        groups = (W * scales).unflatten(1, (scheme.groups(W.shape[1]), -1))
        importance = (gram.diagonal() / scales.square()).view(groups.shape[1], -1)
        scale, zero = search(groups, scheme, torch.float32, steps, 0.6, importance)
        off = dequantize(quantize(groups, scale, zero, scheme.qmax), scale, zero).flatten(1) / scales - W
        total += ((off @ gram) * off).sum(dtype=torch.float64).item()
    return total
