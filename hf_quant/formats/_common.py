"""What formats of other programs share: checks of their tensors, orders of columns, group sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import translate
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.layout import Shaped
from hf_quant.core.packing import pack
from hf_quant.core.pages import empty
from hf_quant.core.scheme import MULTIPLE, QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Headers, Layer, Traits

MAX_GLOBS = 200
IN_FLOAT = "its activations stay in floating point"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class ReadOnly(Traits):
    """The half of a `Format` that is not there, for formats that are read and run but not written."""

    def why_not(self, scheme: QuantScheme) -> str | None:
        """Always a reason."""
        return f"it is read and run, not written, in {scheme.bits} bits as in any"

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Raises FormatError."""
        raise FormatError(f"{type(self).__name__}: {self.why_not(scheme)}")

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Raises FormatError."""
        raise FormatError(f"{type(self).__name__}: {self.why_not(tensor.scheme)}")

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Raises FormatError: for formats whose layers all have a scheme."""
        raise FormatError(f"{type(self).__name__}: every layer has codes")

    def config(self, schemes: Mapping[str, QuantScheme], left: Sequence[str]) -> dict[str, Any]:
        """Raises FormatError."""
        raise FormatError(f"{type(self).__name__}: it is read and run, not written")


def each_layer(headers: Headers, layer: Callable[[str, Mapping[str, Any]], Layer | None]) -> dict[str, Layer]:
    """`Format.layers` by what ``layer`` makes of a module and its headers: None for one in floating point.

    Raises:
        FormatError: Of ``layer``, with the name of the module before it.
    """
    layers = {}
    for module, tensors in headers.items():
        try:
            coded = layer(module, tensors)
        except FormatError as error:
            raise FormatError(f"{module}: {error}") from None
        if coded is not None:
            layers[module] = coded
    return layers


def need(
    tensors: Mapping[str, Any], name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int | None] | None = None
) -> Any:
    """The tensor (or header) of that name.

    Args:
        tensors: Local name to tensor or header.
        name: The one wanted.
        dtypes: The types it may have.
        shape: What it must be; None for an axis of any size above zero.

    Raises:
        FormatError: It is missing, or is something else; the message names it.
    """
    tensor: Shaped | None = tensors.get(name)
    if tensor is None:
        raise FormatError(f"{name} is missing")
    if tensor.dtype not in dtypes:
        raise FormatError(f"{name} has dtype {short(tensor.dtype)}, expected {' or '.join(map(short, dtypes))}")
    has = list(tensor.shape)
    if shape is not None and (
        len(has) != len(shape) or any(h < 1 or (s or h) != h for h, s in zip(has, shape, strict=True))
    ):
        raise FormatError(f"{name} has shape {has}, expected {[s or 'any' for s in shape]}")
    return tensor


def short(dtype: torch.dtype) -> str:
    """Its name without the package's."""
    return str(dtype).removeprefix("torch.")


def check_scale(name: str, scale: Tensor) -> None:
    """Every scale is finite, and not all of them are zero; AutoRound makes negative ones."""
    bad = int((~scale.isfinite()).sum())
    if bad:
        raise FormatError(f"{name}: {bad} scales are not finite numbers")
    if not bool(scale.any()):
        raise FormatError(f"{name}: all scales are zero, so the file is damaged")


def check_input_scale(name: str, scale: Tensor) -> None:
    """Every scale of activations is a number above zero."""
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise FormatError(f"{name}: must be a finite number above zero")


def one_value(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of that name, which holds a single float, as ``[1]``.

    Raises:
        FormatError: It is missing, or has another shape or type.
    """
    value: Tensor = need(tensors, name, FLOATS)
    if value.numel() != 1:
        raise FormatError(f"{name} has shape {list(value.shape)}, expected one value")
    return value.reshape(1)


def times_blocks(weight: Tensor, grid: Tensor, rows: int, columns: int) -> Tensor:
    """A weight ``[N, K]`` in float32, every block of that many rows and columns times its number in ``grid``."""
    n, k = weight.shape
    return weight.float() * grid.float().repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]


def held_elsewhere(scheme: QuantScheme) -> str | None:
    """Why a format of whole words and one level of scales does not hold a scheme, and what does; None if that is not the reason."""
    if scheme.blocks:
        return f"scales of {scheme.blocks} are in two levels, which it does not have and GGUF has: --to gguf"
    if scheme.padding:
        return f"it has no place for {scheme.padding} zero columns behind a layer's own, which the native format has"
    return None


def settled(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same weight; groups whose scale is zero (float16 underflows) get a scale of one, and codes of zero."""
    dead = tensor.scale == 0
    if not bool(dead.any()):
        return tensor
    zeros = tensor.zeros()
    codes = tensor.codes().unflatten(-1, (zeros.shape[-1], -1))
    codes = torch.where(dead[..., None], zeros[..., None], codes).flatten(-2)
    return replace(tensor, qweight=pack(codes, tensor.scheme.bits), scale=torch.where(dead, 1, tensor.scale))


def codes_of(name: str, signed: Tensor, scheme: QuantScheme) -> Tensor:
    """uint8, of the signed integers that are stored one a byte."""
    least, most = -scheme.zero, scheme.qmax - scheme.zero
    kind = torch.iinfo(signed.dtype)
    if (kind.min < least or kind.max > most) and signed.numel():
        low, high = (int(value) for value in signed.aminmax())
        if low < least or high > most:
            raise FormatError(f"{name}: values from {low} to {high} are not those of {scheme.bits} bits")
    if signed.dtype is not torch.int8:
        return signed.add(scheme.zero).to(torch.uint8)
    codes = empty(tuple(signed.shape), torch.uint8, signed.device)
    return torch.add(signed.view(torch.uint8), scheme.zero, out=codes)


def scheme_for(bits: int, group_size: int, in_features: int, symmetric: bool, **kind: Any) -> QuantScheme | None:
    """The scheme that holds groups of any size: the largest group of a legal size that stays inside the stored ones.

    Scales are repeated then, which loses nothing. None if no legal size does, or if the codes of a row fill no words.
    ``group_size`` -1 means whole rows.
    """
    if in_features % MULTIPLE:
        return None
    common = math.gcd(group_size, in_features)
    size = common & -common
    if group_size == -1 or (group_size >= in_features and size < in_features):
        size = -1
    return QuantScheme(bits, size, symmetric, **kind) if size == -1 or size >= 16 else None


def group_of(in_features: int, group_size: int, step: int) -> Tensor:
    """int64 ``[K / step]``: the stored group that each run of ``step`` columns belongs to."""
    return torch.arange(0, in_features, step) // group_size


def spread(groups: Tensor, in_features: int, group_size: int, scheme: QuantScheme) -> Tensor:
    """``[N, G]`` of the stored groups to ``[N, G']`` of the scheme's, which are as large or smaller."""
    count = scheme.groups(in_features)
    if count == groups.shape[-1]:
        return groups.contiguous()
    return groups[..., group_of(in_features, group_size, in_features // count).to(groups.device)]


def order_of(name: str, g_idx: Tensor, groups: int, group_size: int) -> Tensor | None:
    """The order of columns that makes groups consecutive, int64 ``[K]``; None if they are.

    Raises:
        FormatError: The index points outside the groups, or fills a group with too many columns.
    """
    k = len(g_idx)
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise FormatError(f"{name}: {int(g_idx.min())}..{int(g_idx.max())} is not inside the {groups} groups")
    expected = group_of(k, group_size, 1)
    order = torch.argsort(g_idx.cpu(), stable=True)
    if not torch.equal(g_idx.cpu()[order].long(), expected):
        raise FormatError(f"{name}: groups do not have {group_size} columns each")
    return None if torch.equal(order, torch.arange(k)) else order


class Globs:
    """Names and patterns of a config, as many as a stranger likes: names are looked up, and only patterns are tried.

    Args:
        field: Where they stand, for messages.
        patterns: In their order; ``*``, ``?`` and ``[`` make a pattern.

    Raises:
        FormatError: There are more patterns than any program writes.
    """

    def __init__(self, field: str, patterns: Iterable[str]) -> None:
        self._names: dict[str, int] = {}
        self._globs: list[tuple[int, Callable[[str], object]]] = []
        for place, pattern in enumerate(patterns):
            if not set(pattern) & set("*?["):
                self._names.setdefault(pattern, place)
            elif len(self._globs) == MAX_GLOBS:
                raise refused(field, pattern, f"more than {MAX_GLOBS} patterns")
            else:
                self._globs.append((place, re.compile(translate(pattern)).match))

    def first(self, names: Sequence[str]) -> int | None:
        """The place of the first that fits one of the names; None if none does."""
        places = [self._names[name] for name in names if name in self._names]
        places += [place for place, match in self._globs if any(map(match, names))][:1]
        return min(places, default=None)


def is_sequence(value: Any) -> bool:
    """Whether a field of a config is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def refused(field: str, value: Any, reason: str) -> FormatError:
    """Says which field of a ``quantization_config`` holds what."""
    return FormatError(f"quantization_config.{field} {ascii(value)[:80]}: {reason}")


def integer(config: Mapping[str, Any], field: str, allowed: Sequence[int] | range, default: int | None = None) -> int:
    """An integer field of a config; true and 4.0 are none."""
    value = config.get(field, default)
    if type(value) is not int or value not in allowed:
        raise refused(
            field, value, f"must be an integer {'in ' + str(tuple(allowed)) if len(allowed) < 9 else 'in range'}"
        )
    return value


def permuted(tensor: QuantizedTensor, order: Tensor) -> QuantizedTensor:
    """The same weight, its columns stored in ``order`` int64 ``[K]``; scales and zero points are of that order already."""
    codes = tensor.codes().index_select(-1, order.to(tensor.qweight.device))
    perm = order.to(torch.int32)[None].to(tensor.qweight.device)
    return QuantizedTensor(pack(codes, tensor.scheme.bits), tensor.scale, tensor.zero_point, tensor.scheme, perm)
