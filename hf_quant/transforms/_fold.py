"""Multiplies the input columns of a stage by scales and divides the producer of that input, so that the function stays the same.

Scales are powers of two, so that dividing weights or the scales of codes by them is exact in any floating-point format.
Where the stored weight of a norm cannot represent its quotient, the columns are scaled by what it can represent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.geometry import geometry_of, weight_of
from hf_quant.core.numerics import dequantize, grouped, quantize
from hf_quant.core.rounding import search
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import quadratic
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.core.two_levels import holds
from hf_quant.transforms import Stage
from hf_quant.transforms._judge import call_of, changed, close

TOGETHER = 1 << 22  # weights that are rounded together: several copies of them are in memory for a moment
PAIRS = {
    "o_proj": "v_proj",
    "down_proj": "up_proj",
    "w2": "w3",
    "out_proj": "v_proj",
}  # consumer: producer of its input, whose rows are the columns of the consumer


def powers_of_two(scales: Tensor) -> Tensor:
    """The nearest powers of two, within 2^-12 .. 2^12 of the geometric mean."""
    log = scales.clamp(min=1e-30).log2()
    return torch.exp2((log - log.median()).round().clamp(-12, 12))


def fold(stage: Stage, scales: Tensor) -> str | None:
    """Multiply the columns of a stage by ``scales [K]`` and divide the producer of its input, in both blocks.

    Returns:
        None, or the reason why it is not possible; then nothing has changed.
    """
    producer = _producer(stage)
    if producer is None:
        return "nothing before it can take the scales"
    if (convolution := stage.convolution(producer, *stage.layers)) is not None:
        return f"{convolution} is a convolution"
    shared = _shared(stage, producer, scales)
    if shared is None:
        return f"{producer} has fewer rows than this has columns"
    norm = stage.block.get_submodule(producer).weight.ndim == 1
    folded = _into_norm(stage, producer, shared) if norm else _into_layer(stage, producer, shared)
    if isinstance(folded, str):
        return f"{producer} {folded}"
    other = changed(
        stage, producer, lambda out: out / folded.rows.to(out), stage.layers, lambda x: x * folded.columns.to(x)
    )
    if other is not None:
        return f"the output of {producer} is used elsewhere too{f', by {other}' if other else ''}"
    for block in stage.blocks:
        module: Any = block.get_submodule(producer)
        module.weight.data.copy_(folded.weight)
        if folded.bias is not None:
            module.bias.data.copy_(folded.bias)
        for name in stage.layers:
            weight_of(block.get_submodule(name)).mul_(folded.columns)
    if folded.codes is not None:
        stage.codes[producer] = folded.codes
    _rescale(stage, folded.columns)
    return None


@dataclass(frozen=True)
class _Taken:
    """The new weights of a producer.

    Attributes:
        rows: What each row of its output is divided by.
        columns: float32 ``[K]``, what the columns of the stage are multiplied by.
        weight: Its new weight, in the layout of the module.
        bias: Its new bias; None if it has none.
        codes: Its new codes; None if it has none.
    """

    rows: Tensor
    columns: Tensor
    weight: Tensor
    bias: Tensor | None
    codes: QuantizedTensor | None = None


def _producer(stage: Stage) -> str | None:
    """Local name of the norm, or of the layer, whose output is the stage's input."""
    width = stage.stats.gram.shape[0]
    if stage.source is not None:
        weight = getattr(stage.block.get_submodule(stage.source), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1 and weight.numel() == width:
            return stage.source
    first = next(iter(stage.layers))
    path, _, leaf = first.rpartition(".")
    name = f"{path}.{PAIRS.get(leaf)}".lstrip(".")
    return name if any(name == module_name for module_name, _ in stage.block.named_modules()) else None


def _shared(stage: Stage, producer: str, scales: Tensor) -> Tensor | None:
    """One scale for all heads that read the same rows (grouped-query attention)."""
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
    """For a norm that multiplies by ``c + weight``: c is 1 in Gemma and 0 in most other models.

    The weight is rounded to the dtype it is stored in; the columns take the rest of the scale.
    """
    module: Any = stage.block.get_submodule(producer)
    weight, bias, call = module.weight.data.clone(), getattr(module, "bias", None), call_of(stage, producer)
    offset = _offset(module, call)
    if offset is None:
        return "does not multiply by its weight, or by one more than that"
    gain = weight + offset
    rounded = (gain / scales.to(gain) - offset).to(stage.stored(f"{producer}.weight")).to(weight)
    share = gain / (rounded + offset)
    unchanged = ~((share > scales / 2) & (share < scales * 2))  # a gain of zero, or one too small for the type
    rounded, share = torch.where(unchanged, weight, rounded), torch.where(unchanged, torch.ones_like(share), share)
    moved = None if bias is None else (bias.data / share).to(stage.stored(f"{producer}.bias")).to(bias.data)
    before, old = call(), None if bias is None else bias.data.clone()
    _set(module, rounded, moved)
    after = call()
    _set(module, weight, old)
    if not isinstance(before, Tensor) or not close(before / share, after):
        return f"is stored in {stage.stored(f'{producer}.weight')}, which cannot hold it divided by the scales"
    return _Taken(share, share.float(), rounded, moved)


def _offset(module: Any, call: Callable[[], Any]) -> float | None:
    """The c of a norm's ``c + weight``, found from its output; None if it computes something else."""
    weight, bias = module.weight.data.clone(), getattr(module, "bias", None)
    old = None if bias is None else bias.data.clone()
    outputs = []
    for tried in (torch.zeros_like(weight), torch.ones_like(weight), weight):
        _set(module, tried, None if old is None else torch.zeros_like(old))
        outputs.append(call())
    _set(module, weight, old)
    if not all(isinstance(out, Tensor) for out in outputs):
        return None
    zero, one, out = outputs
    unit = one - zero  # the factor of the weight
    size = float(unit.double().square().sum())
    offset = float(round(float((unit * zero).sum(dtype=torch.float64)) / size)) if size > 0 else 0.0
    return offset if size > 0 and close(unit * (weight + offset), out) and close(unit * (1 + offset), one) else None


def _set(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    module.weight.data.copy_(weight)
    if bias is not None:
        module.bias.data.copy_(bias)


def _into_layer(stage: Stage, producer: str, scales: Tensor) -> _Taken | str:
    """For a linear layer: its rows are divided, and the scales of its codes if it has been quantized."""
    module: Any = stage.block.get_submodule(producer)
    row_scales = _per_row(scales, weight_of(module).shape[0], stage.block.get_submodule(producer.rpartition(".")[0]))
    bias, codes = getattr(module, "bias", None), stage.codes.get(producer)
    if codes is not None:
        codes = _divided(codes, row_scales)
        kind = codes.scheme.k_quant
        exact = _exact(stage.codes[producer].scale, codes.scale, row_scales[:, None]) and (
            kind is None or holds(codes.scale, codes.zero_point, kind)
        )
    else:
        dtype = stage.stored(f"{producer}.weight")
        stored = weight_of(module).to(dtype)
        exact = _exact(stored, (stored.float() / row_scales[:, None]).to(dtype), row_scales[:, None])
    if not exact:
        return "is stored in a type that cannot hold it divided by the scales"
    weight = geometry_of(module).weight(weight_of(module) / row_scales[:, None])
    return _Taken(row_scales, scales, weight, None if bias is None else bias.data / row_scales, codes)


def _exact(before: Tensor, after: Tensor, by: Tensor) -> bool:
    return bool((after.float() * by == before.float()).all())


def _per_row(scales: Tensor, rows: int, parent: nn.Module) -> Tensor:
    if rows == scales.numel():
        return scales
    head: Any = parent.head_dim
    return scales.view(rows // head, -1, head)[:, 0].reshape(-1)


def _divided(codes: QuantizedTensor, row_scales: Tensor) -> QuantizedTensor:
    """Codes with their rows divided by powers of two, which changes only scales and outliers."""
    outliers = codes.outliers
    if outliers is not None:
        outliers = replace(outliers, value=outliers.value / row_scales[:, None].to(outliers.value))
    return replace(codes, scale=codes.scale / row_scales[:, None].to(codes.scale), outliers=outliers, coded=None)


def _rescale(stage: Stage, scales: Tensor) -> None:
    """Adapt the statistics of an input that is divided by ``scales``."""
    stats = stage.stats
    for products in (stats.gram, stats.drift):
        if products is not None:
            products.div_(scales[:, None]).div_(scales)
    stats.peak = stats.peak / scales
    stats.sample = [x / scales for x in stats.sample]
    stats.held = [(x / scales, off / scales) for x, off in stats.held]
    stats.forget()


def rounding_error(weights: list[tuple[Tensor, QuantScheme]], gram: Tensor, scales: Tensor, steps: int) -> float:
    """Squared output error of layers that share an input, rounded to nearest with scaled columns.

    Args:
        weights: float32 ``[N, K]``, with its scheme, for each layer.
        gram: float32 ``[K, K]``, Gram matrix of the inputs without the scales, up to a factor.
        scales: float32 ``[K]``.
        steps: Ranges tried for each group.
    """
    total = 0.0
    for weight, scheme in weights:
        importance = grouped(gram.diagonal() / scales.square(), scheme)
        for W in weight.split(max(1, TOGETHER // len(gram))):
            groups = grouped(W * scales, scheme)
            scale, zero = search(groups, scheme, torch.float32, steps, 0.6, importance)
            rounded = dequantize(quantize(groups, scale, zero, scheme), scale, zero).flatten(1)[:, : W.shape[1]]
            off = rounded / scales - W
            total += quadratic(off, gram).sum(dtype=torch.float64).item()
    return total
