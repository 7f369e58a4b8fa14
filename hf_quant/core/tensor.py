"""The quantized weight that every method returns, every format stores and every kernel reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.coded_scales import CodedScales, recovered
from hf_quant.core.layout import WEIGHT, coded_parts, coded_scales, index_dtype, part_name, scale_parts
from hf_quant.core.numerics import levels, padded
from hf_quant.core.packing import pack, unpack, unpack_short
from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import SchemeError


@dataclass(frozen=True, slots=True)
class Outliers:
    """Weights that stay in floating point. They are added to the dequantized codes, which are zero there.

    Attributes:
        index: Input columns, in `index_dtype`: ``[..., C]`` for whole columns, ``[..., N, R]`` for columns of each row.
        value: ``[..., N, C]`` or ``[..., N, R]``.
    """

    index: Tensor
    value: Tensor

    @classmethod
    def gather(cls, weight: Tensor, index: Tensor, dtype: torch.dtype) -> Outliers:
        """The outliers of ``weight`` ``[N, K]`` at ``index``."""
        value = weight[:, index] if index.ndim == 1 else weight.gather(1, index.long())
        return cls(index.to(index_dtype(weight.shape[1])), value.to(dtype))

    def add_to(self, weight: Tensor) -> Tensor:
        """``weight`` ``[..., N, K]`` with the outliers added, in place."""
        return weight.scatter_add_(-1, self._by_row(), self.value.to(weight.dtype))

    def taken_from(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The values of ``weight`` ``[..., N, K]`` at these positions, and the weight with zeros there."""
        index = self._by_row()
        return weight.gather(-1, index).to(self.value.dtype), weight.scatter(-1, index, 0)

    def _by_row(self) -> Tensor:
        """The columns of each row, int64."""
        index = self.index.long()
        return index if index.ndim == self.value.ndim else index[..., None, :].expand(self.value.shape)


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A quantized weight matrix ``[N, K]``, or a stack of them with leading axes ``...``.

    Below, K counts the columns that are stored, which are more than those of the weight where the scheme has padding.

    Attributes:
        qweight: uint8 ``[..., N, K / 8 * bits]``, packed along K by `packing.pack`.
        scale: floating point ``[..., N, G]``, G = ``scheme.groups(K)``.
        zero_point: uint8 ``[..., N, G]`` (for ``real_zero``: the dtype of the scale); None for a symmetric scheme.
        scheme: The scheme of the codes.
        perm: int32 ``[..., S, K]`` for a permuted scheme: column j of the codes is column ``perm[s, j]`` of the weight, in the s-th
            of S equal parts of the rows (the gate and up halves of a stack; otherwise S is 1).
        outliers: If the scheme has some.
        input_scale: floating point ``[..., 1]``, the static scale of all activations, if the scheme has one.
        coded: What ``scale`` and ``zero_point`` were made of, if the scheme has scales in two levels; None if that is to be found.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: QuantScheme
    perm: Tensor | None = None
    outliers: Outliers | None = None
    input_scale: Tensor | None = None
    coded: CodedScales | None = None

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme, outliers: Outliers | None = None
    ) -> QuantizedTensor:
        """Pack ``codes`` ``[..., N, K]``, K a multiple of 32; the zero point is dropped for a symmetric scheme."""
        if codes.shape[-1] % 32:
            raise SchemeError(f"in_features must be a multiple of 32, got {codes.shape[-1]}")
        return cls.of_packed(pack(codes, scheme.bits), scale, zero_point, scheme, outliers)

    @classmethod
    def of_packed(
        cls, qweight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme, outliers: Outliers | None = None
    ) -> QuantizedTensor:
        """Of packed codes ``[..., N, K / 8 * bits]``; the zero point is dropped for a symmetric scheme."""
        zero = None if scheme.symmetric else zero_point if scheme.real_zero else zero_point.to(torch.uint8)
        return cls(qweight, scale, zero, scheme, outliers=outliers)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """Inverse of `parts`, for parts that `layout.wrong_shape` accepts; 8-bit codes may also be flat, ``[..., N, K]``."""
        codes, scale, zero = parts[WEIGHT], parts["weight_scale"], parts.get("weight_zero_point")
        if scheme.scale_bits is not None:
            flat = codes.flatten(-2) if codes.ndim > scale.ndim else codes
            return cls.from_coded(flat, coded_scales(parts, scheme, flat.shape[-1] * 8 // scheme.bits), scheme)
        if zero is not None and not scheme.real_zero:
            zero = unpack_short(zero, scheme.bits, scale.shape[-1])
        outliers = None
        if scheme.outliers and "weight_outlier_index" in parts:
            outliers = Outliers(parts["weight_outlier_index"], parts["weight_outlier_value"])
        return cls(
            codes if codes.ndim == scale.ndim else codes.flatten(-2), scale, zero, scheme, parts.get("weight_perm"),
            outliers, parts.get("weight_input_scale"),
        )  # fmt: skip

    @classmethod
    def from_coded(cls, qweight: Tensor, coded: CodedScales, scheme: QuantScheme) -> QuantizedTensor:
        """Of packed codes and scales in two levels."""
        scale = coded.scale(scheme)
        return cls(qweight, scale, coded.zero_point(scale), scheme, coded=coded)

    def parts(self, name: str = WEIGHT) -> dict[str, Tensor]:
        """The tensors of a module or of a checkpoint of this package, as in `core.layout`; codes are not copied.

        Args:
            name: Name of the codes, from which the other names are derived.
        """
        parts = {WEIGHT: self.qweight.unflatten(-1, (-1, 4)) if self.scheme.bits == 8 else self.qweight}
        if self.scheme.scale_bits is not None:
            coded = self.coded or recovered(self.scale, self.zero_point, self.scheme)
            parts |= coded_parts(coded, self.scheme)
        else:
            parts |= scale_parts(self.scale, self.zero_point, self.scheme)
        if self.perm is not None:
            parts["weight_perm"] = self.perm
        if self.outliers is not None:
            parts |= {"weight_outlier_index": self.outliers.index, "weight_outlier_value": self.outliers.value}
        if self.input_scale is not None:
            parts["weight_input_scale"] = self.input_scale
        return {part_name(name, part): tensor for part, tensor in parts.items()}

    @classmethod
    def of_rows(cls, parts: Iterator[QuantizedTensor], n: int) -> QuantizedTensor:
        """One matrix of ``n`` rows from consecutive parts, without holding all rows twice."""
        joined, at = None, 0
        for part in parts:
            joined = joined or part._with_rows(n)
            for target, source in zip(joined._by_row(), part._by_row(), strict=True):
                target[at : at + source.shape[0]] = source
            at += part.qweight.shape[0]
        if joined is None or at != n:
            raise SchemeError(f"{at} rows instead of {n}")
        return joined

    @classmethod
    def stack(cls, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """A stack ``[E, ...]`` of E matrices with the same shape and scheme."""
        first = parts[0]
        zero = (
            None
            if first.zero_point is None
            else torch.stack([p.zero_point for p in parts if p.zero_point is not None])
        )
        outliers = [part.outliers for part in parts if part.outliers is not None]
        joined = (
            Outliers(torch.stack([o.index for o in outliers]), torch.stack([o.value for o in outliers]))
            if outliers
            else None
        )
        qweight, scale = torch.stack([p.qweight for p in parts]), torch.stack([p.scale for p in parts])
        ranges = [part.input_scale for part in parts if part.input_scale is not None]
        input_scale = torch.stack(ranges) if ranges else None
        scales = [part.coded for part in parts if part.coded is not None]
        coded = CodedScales.joined(scales, torch.stack) if len(scales) == len(parts) else None
        return cls(qweight, scale, zero, first.scheme, outliers=joined, input_scale=input_scale, coded=coded)

    def _by_row(self) -> list[Tensor]:
        """All tensors with one entry per row."""
        tensors = [self.qweight, self.scale] + ([] if self.zero_point is None else [self.zero_point])
        tensors += [] if self.coded is None else self.coded.parts()
        if self.outliers is None:
            return tensors
        return [*tensors, self.outliers.value] + ([self.outliers.index] if self.outliers.index.ndim == 2 else [])

    def _with_rows(self, n: int) -> QuantizedTensor:
        """An uninitialized tensor of ``n`` rows with the same scheme."""

        def room(tensor: Tensor) -> Tensor:
            return tensor.new_empty(n, *tensor.shape[1:])

        outliers = self.outliers
        if outliers is not None:
            index = room(outliers.index) if outliers.index.ndim == 2 else outliers.index
            outliers = Outliers(index, room(outliers.value))
        zero = None if self.zero_point is None else room(self.zero_point)
        coded = None if self.coded is None else self.coded.mapped(room)
        return QuantizedTensor(room(self.qweight), room(self.scale), zero, self.scheme, outliers=outliers, coded=coded)

    def cpu(self) -> QuantizedTensor:
        """The same tensor in main memory."""

        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: part.cpu() for name, part in values.items() if isinstance(part, Tensor)}
        if self.outliers is not None:
            values["outliers"] = Outliers(self.outliers.index.cpu(), self.outliers.value.cpu())
        if self.coded is not None:
            values["coded"] = self.coded.mapped(Tensor.cpu)
        return QuantizedTensor(**values)

    @property
    def columns(self) -> int:
        """Stored columns, from the width of the packed codes."""
        return self.qweight.shape[-1] * 8 // self.scheme.bits

    @property
    def in_features(self) -> int:
        """Columns of the weight: the stored ones without padding."""
        return self.columns - self.scheme.padding

    @property
    def stored(self) -> QuantizedTensor:
        """The stored matrix, where the padding is columns like all others."""
        return replace(self, scheme=self.scheme.stored) if self.scheme.padding else self

    def codes(self) -> Tensor:
        """The codes of all stored columns, uint8 ``[..., N, K]``, in stored order."""
        return unpack(self.qweight, self.scheme.bits)

    def zeros(self) -> Tensor:
        """The zero points ``[..., N, G]``, also those of a symmetric scheme."""
        if self.zero_point is not None:
            return self.zero_point
        return torch.full_like(self.scale, self.scheme.zero, dtype=torch.uint8)

    def nearest_to(self, weight: Tensor) -> QuantizedTensor:
        """The nearest codes for a weight, with the scales, zero points and outlier positions of this tensor.

        The float32 result of `dequantize` becomes the same codes again.
        """
        wide = padded(weight.float(), self.scheme)
        wide = wide if self.perm is None else as_stored(wide, self.perm)
        outliers = None
        if self.outliers is not None:
            value, wide = self.outliers.taken_from(wide)
            outliers = Outliers(self.outliers.index, value)
        scale = self.scale.float()[..., None]
        real = (wide.unflatten(-1, (scale.shape[-2], -1)) / scale).nan_to_num_()  # a scale may be zero
        if self.scheme.codebook is None:
            codes = real.add_(self.zeros().float()[..., None]).round_().clamp_(self.scheme.qmin, self.scheme.qmax)
        else:
            codes = (real[..., None] - levels(self.scheme.codebook, real.device)).abs_().argmin(-1)
        packed = pack(codes.to(torch.uint8).flatten(-2), self.scheme.bits)
        return replace(self, qweight=packed, outliers=outliers)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights ``[..., N, K]``, computed in float32 (float64 if asked for) and rounded once to ``dtype``."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        groups, offset = self.codes().unflatten(-1, (self.scale.shape[-1], -1)), None
        if self.coded is not None and self.coded.offset is not None:  # to the last bit what llama.cpp computes
            real, offset = groups.to(wide), self.coded.subtracted()
        elif self.scheme.codebook is None:
            real = groups.to(wide) - self.zeros().to(wide)[..., None]
        else:
            real = levels(self.scheme.codebook, groups.device).to(wide)[groups.int()]
        dense = real * self.scale.to(wide)[..., None]
        dense = (dense if offset is None else dense - offset[..., None]).flatten(-2)
        if self.outliers is not None:
            dense = self.outliers.add_to(dense)
        dense = dense.to(dtype or self.scale.dtype)
        dense = dense if self.perm is None else in_order(dense, self.perm)
        return dense[..., : -self.scheme.padding].contiguous() if self.scheme.padding else dense


def as_stored(weight: Tensor, perm: Tensor) -> Tensor:
    """Inverse of `in_order`: ``[..., N, K]`` with its columns in the order of the codes."""
    parts = weight.unflatten(-2, (perm.shape[-2], -1))
    return parts.gather(-1, perm.long().unsqueeze(-2).expand_as(parts)).flatten(-3, -2)


def in_order(columns: Tensor, perm: Tensor) -> Tensor:
    """``[..., N, K]`` with its columns back in the order of the weight; ``perm [..., S, K]`` as in `QuantizedTensor`."""
    parts = columns.unflatten(-2, (perm.shape[-2], -1))
    return parts.gather(-1, perm.argsort(-1).unsqueeze(-2).expand_as(parts)).flatten(-3, -2)
