"""The parts of a `QuantizedTensor` as modules hold them in memory: their names, shapes and dtypes, and checks of their values.

A weight ``[N, K]`` in G groups a row, where K counts the columns that are stored, those of padding too; a stack of weights has its
leading axes before all of these:

| part | dtype | shape |
|---|---|---|
| ``weight`` | uint8 | ``[N, K / 8 * bits]``; in 8 bits ``[N, K / 4, 4]`` |
| ``weight_scale`` | floating point | ``[N, G]`` |
| ``weight_zero_point`` | uint8, packed like codes | ``[N, ceil(G * bits / 8)]``; real zero points: ``[N, G]``, dtype of the scale |
| ``weight_scale_code`` | uint8 | scales in two levels: ``[N, ceil(G * b / 8)]``, their codes of b bits; ``weight_scale`` is then ``[N, B]`` |
| ``weight_zero_point_code`` | uint8 | the same of offsets, and ``weight_zero_point`` is then ``[N, B]`` |
| ``weight_perm`` | int32 | ``[1, K]``: column j of the codes is column ``perm[j]`` of the weight |
| ``weight_outlier_index`` | `index_dtype` | ``[C]`` for whole columns, ``[N, C]`` for columns of each row |
| ``weight_outlier_value`` | dtype of the scale | ``[N, C]`` |
| ``weight_input_scale`` | dtype of the scale | ``[1]``: one static scale for all activations |

The codes are called ``weight`` and have another shape than the float weight, so that transformers without this package
refuses such a checkpoint for a shape mismatch; under a name of their own it would warn and run on random weights.
A parameter of another name, such as a stack of experts, takes the place of ``weight`` in all of these names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_quant.core.coded_scales import CodedScales
from hf_quant.core.numerics import LEVELS
from hf_quant.core.packing import pack_short, unpack_short
from hf_quant.core.scheme import MULTIPLE, QuantScheme
from hf_quant.errors import SchemeError

WEIGHT = "weight"
PARTS = (
    WEIGHT, "weight_scale", "weight_zero_point", "weight_perm", "weight_outlier_index", "weight_outlier_value",
    "weight_input_scale", "weight_scale_code", "weight_zero_point_code",
)  # fmt: skip
COMPANIONS = tuple(part.removeprefix(WEIGHT) for part in PARTS[1:])  # what is appended to the name of the codes

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Shaped(Protocol):
    """What a header tells of a tensor; a tensor tells it too."""

    @property
    def shape(self) -> Sequence[int]:
        """Its axes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        ...


def part_name(codes: str, part: str) -> str:
    """Name of a part whose codes are called ``codes``: ``part_name("down_proj", "weight_scale") == "down_proj_scale"``."""
    return codes + part.removeprefix(WEIGHT)


def index_dtype(columns: int) -> torch.dtype:
    """The dtype in which the numbers of that many columns are stored: int16, or int32 where they do not fit."""
    return torch.int16 if columns <= 1 << 15 else torch.int32


def scale_dtype(scheme: QuantScheme, dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales where ``dtype`` is asked for: those of two levels need more than 16 bits."""
    return dtype if scheme.scale_bits is None else torch.float32


def shapes_of(shape: tuple[int, ...], scheme: QuantScheme, dtype: torch.dtype) -> Shapes:
    """Part to (shape, dtype) for a weight ``[..., N, K]`` in ``scheme`` with scales in ``dtype``.

    Raises:
        SchemeError: The groups of the scheme do not divide K.
    """
    scheme, (*lead, n, k) = scheme.stored, (*shape[:-1], scheme.columns(shape[-1]))
    groups, outliers = scheme.groups(k), scheme.outlier_count(k)
    codes = (n, k // 4, 4) if scheme.bits == 8 else (n, scheme.packed_bytes(k))
    dtype = scale_dtype(scheme, dtype)
    shapes: Shapes = {WEIGHT: (codes, torch.uint8), "weight_scale": ((n, groups), dtype)}
    if scheme.scale_bits is not None:
        for part, bits in zip(("weight_scale", "weight_zero_point"), scheme.scale_bits, strict=True):
            if bits:
                shapes[part] = ((n, scheme.units(k)), torch.float16 if scheme.blocks else torch.float32)
                shapes[f"{part}_code"] = ((n, -(-groups * bits // 8)), torch.uint8)
    elif not scheme.symmetric:
        packed = ((n, scheme.zero_bytes(k)), torch.uint8)
        shapes["weight_zero_point"] = ((n, groups), dtype) if scheme.real_zero else packed
    if scheme.permuted:
        shapes["weight_perm"] = ((1, k), torch.int32)
    if outliers:
        shapes["weight_outlier_index"] = ((outliers,) if scheme.outlier_columns else (n, outliers), index_dtype(k))
        shapes["weight_outlier_value"] = ((n, outliers), dtype)
    if scheme.activations == "tensor":
        shapes["weight_input_scale"] = ((1,), dtype)
    return {part: ((*lead, *size), kind) for part, (size, kind) in shapes.items()}


def bytes_of(shape: tuple[int, ...], scheme: QuantScheme, dtype: torch.dtype) -> int:
    """Bytes of all parts of a weight ``[..., N, K]``; arguments and errors as of `shapes_of`."""
    return sum(torch.Size(size).numel() * kind.itemsize for size, kind in shapes_of(shape, scheme, dtype).values())


def in_features(codes: Shaped, scheme: QuantScheme) -> int:
    """K, which the width of the codes and the padding of the scheme tell."""
    stored: int = codes.shape[-2] * codes.shape[-1] if scheme.bits == 8 else codes.shape[-1]
    return stored * 8 // scheme.bits - scheme.padding


def wrong_shape(parts: Mapping[str, Shaped], scheme: QuantScheme) -> str | None:
    """A sentence on the first part that has not the shape or dtype that the scheme asks for; None if all have."""
    if missing := next((part for part in PARTS[:2] if part not in parts), None):
        return f"{missing} is missing"
    weight, scale = parts[WEIGHT], parts["weight_scale"]
    if len(scale.shape) < 2 or len(weight.shape) != len(scale.shape) + (scheme.bits == 8):
        return f"weight has shape {list(weight.shape)} and weight_scale {list(scale.shape)}: not those of {scheme}"
    *lead, n, _groups = scale.shape
    k = in_features(weight, scheme)
    if not n or k < 1:
        return f"weight has shape {list(weight.shape)}: it is empty"
    try:
        _check_padding(k, scheme, stacked=bool(lead))
        expected = shapes_of((n, k), scheme, scale.dtype)
    except SchemeError as error:
        return f"weight has shape {list(weight.shape)}: {error}"
    for part in (*expected, *parts):
        if (part in expected) != (part in parts):
            return f"{part} is {'missing' if part in expected else 'not part'} of {scheme}"
        shape, dtype = expected[part]
        wanted = [[*lead, *shape]] + ([[*lead, 2, k]] if lead and part == "weight_perm" else [])  # of gate and up
        if list(parts[part].shape) not in wanted:
            return f"{part} has shape {list(parts[part].shape)}, expected {wanted[0]} for {[n, k]} in {scheme}"
        if parts[part].dtype is not dtype:
            return f"{part} has dtype {_short(parts[part].dtype)}, expected {_short(dtype)} for {scheme}"
    return None


def wrong_values(parts: Mapping[str, Tensor], scheme: QuantScheme, columns: int) -> str | None:
    """A sentence on a value that no kernel may meet among the parts beside the codes; None if there is none.

    Args:
        parts: Of one layer or a stack; the codes need not be there, since all of their values are legal.
        scheme: Of the layer.
        columns: K.
    """
    columns = scheme.columns(columns)
    if scheme.scale_bits is not None:
        parts = {**parts, **_in_one_level(parts, scheme, columns)}
    scale = parts["weight_scale"]
    # codes of other programs only: blocks of zeros have a scale of zero there, and AutoRound makes negative scales
    good = scale.isfinite() if scheme.foreign else scale.isfinite() & (scale != 0)
    if not bool(good.all()):
        return f"weight_scale: {int((~good).sum())} scales are zero or not finite numbers"
    largest = max(LEVELS[scheme.codebook]) if scheme.codebook else scheme.zero if scheme.symmetric else scheme.qmax
    if (
        not scheme.real_zero
        and scale.numel()
        and float(scale.abs().max()) * largest > 2 * torch.finfo(scale.dtype).max
    ):
        return f"weight_scale: weights of {float(scale.abs().max()):g} times {largest} are too large for {_short(scale.dtype)}"
    for part in ("weight_zero_point", "weight_outlier_value"):
        if part in parts and parts[part].is_floating_point() and not bool(parts[part].isfinite().all()):
            return f"{part}: some are not finite numbers"
    ranges = parts.get("weight_input_scale")
    if ranges is not None and not bool((ranges.isfinite() & (ranges > 0)).all()):
        return "weight_input_scale: must be a finite number above zero"
    perm, index = parts.get("weight_perm"), parts.get("weight_outlier_index")
    if perm is not None and not bool((perm.sort(-1).values == torch.arange(columns, device=perm.device)).all()):
        return f"weight_perm: not an order of {columns} columns"
    return None if index is None or not index.numel() else _wrong_index(index, columns)


def coded_scales(parts: Mapping[str, Tensor], scheme: QuantScheme, columns: int) -> CodedScales:
    """Of the parts of a weight of that many columns whose scales are in two levels."""
    assert scheme.scale_bits is not None
    unpacked = []
    for part, bits in zip(("weight_scale", "weight_zero_point"), scheme.scale_bits, strict=True):
        if bits:
            unpacked += [unpack_short(parts[f"{part}_code"], bits, scheme.groups(columns)), parts[part]]
    return CodedScales(*unpacked)


def coded_parts(scales: CodedScales, scheme: QuantScheme) -> dict[str, Tensor]:
    """Inverse of `coded_scales`."""
    assert scheme.scale_bits is not None
    parts = {"weight_scale": scales.unit, "weight_scale_code": pack_short(scales.code, scheme.scale_bits[0])}
    if scales.offset is not None and scales.offset_unit is not None:
        parts["weight_zero_point"] = scales.offset_unit
        parts["weight_zero_point_code"] = pack_short(scales.offset, scheme.scale_bits[1])
    return parts


def scale_parts(scale: Tensor, zero: Tensor | None, scheme: QuantScheme) -> dict[str, Tensor]:
    """Of scales and zero points ``[..., N, G]`` in one level."""
    if zero is None:
        return {"weight_scale": scale}
    return {"weight_scale": scale, "weight_zero_point": zero if scheme.real_zero else pack_short(zero, scheme.bits)}


def _check_padding(k: int, scheme: QuantScheme, *, stacked: bool) -> None:
    if stacked and scheme.padding:
        raise SchemeError("stacks of experts are not padded")
    if scheme.columns(k) % MULTIPLE:
        raise SchemeError(f"{scheme.columns(k)} columns are not a multiple of {MULTIPLE}")


def _in_one_level(parts: Mapping[str, Tensor], scheme: QuantScheme, columns: int) -> dict[str, Tensor]:
    coded = coded_scales(parts, scheme, columns)
    scale = coded.scale(scheme)
    zero = coded.zero_point(scale)
    return {"weight_scale": scale} | ({} if zero is None else {"weight_zero_point": zero})


def _wrong_index(index: Tensor, columns: int) -> str | None:
    """A kernel reads activations at these places, and writes zeros over them."""
    least, most = int(index.min()), int(index.max())
    if least < 0 or most >= columns:
        return f"weight_outlier_index reaches from {least} to {most}, outside of {columns} columns"
    if bool((index.diff() <= 0).any()):
        return "weight_outlier_index: the columns of a row must ascend, each standing once"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
