"""AWQ checkpoints as AutoAWQ, GPTQModel and AutoRound write them: 4 bits, in the GEMM, GEMV and GEMV-fast layouts.

GEMM packs along the output features and interleaves eight of them, GEMV packs along the input features in order. GEMV-fast
interleaves four rows for its kernel and stores ``-scale * zero_point`` in float16, from which the integers are recovered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.packing import pack, unpack, unpack_short
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.core.words import transposed_codes
from hf_quant.errors import FormatError
from hf_quant.formats import Called, Headers, Layer, Traits, Value, by_itself
from hf_quant.formats._common import (
    FLOATS,
    check_scale,
    each_layer,
    group_of,
    held_elsewhere,
    integer,
    need,
    refused,
    scheme_for,
    settled,
    spread,
)

ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # which of eight columns each nibble of a GEMM word holds
VERSIONS = ("gemm", "gemv", "gemv_fast")


@dataclass(frozen=True)
class AWQ(Traits):
    """GEMM: qweight int32 ``[K, N / 8]``, scales ``[G, N]``, qzeros int32 ``[G, N / 8]``.

    GEMV: qweight int32 ``[N, K / 8]``, scales ``[N, G']``, qzeros int32 ``[N, G' / 8]``, with G rounded up to G'.

    Args:
        version: The layout.
        group_size: Input features that share a scale; -1 for whole rows, 0 for equal groups whose number the scales tell.
        symmetric: Whether all zero points are 8.
    """

    version: str = "gemm"
    group_size: int = 0
    symmetric: bool = False

    label: ClassVar[str] = "awq"
    methods: ClassVar[tuple[str, ...]] = ("awq", "auto-round")
    converted_to: ClassVar[bool] = True
    scales_16bit: ClassVar[bool] = True
    variant_fields: ClassVar[tuple[str, ...]] = ("packing_format", "version")
    config_file: ClassVar[str | None] = "quant_config.json"  # of AutoAWQ
    vllm: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AWQ | None:
        method = config.get("quant_method")
        auto_round = method in ("auto-round", "intel/auto-round")
        if method != "awq" and not (
            auto_round and config.get("packing_format") in ("auto_round:auto_awq", "auto_round:awq")
        ):
            return None
        version = "gemm" if auto_round else config.get("version") or "gemm"
        version = version.lower() if isinstance(version, str) else version
        if version not in VERSIONS:
            raise refused("version", version, f"only {', '.join(VERSIONS)} are read")
        integer(config, "bits", (4,), config.get("w_bit", 4))
        size = integer(config, "group_size", range(-1, 1 << 20), config.get("q_group_size", 128))
        if size == 0:
            raise refused("group_size", size, "must be -1 or above zero")
        zeros = config.get("zero_point", True) if not auto_round else not config.get("sym", True)
        if type(zeros) is not bool:
            raise refused("zero_point", zeros, "must be true or false")
        return cls(version, size, not zeros)

    def vllm_kernel(self, scheme: QuantScheme, *, marlin: bool) -> str | None:
        return "Marlin" if marlin and not scheme.symmetric else "AWQ kernel"

    def why_not(self, scheme: QuantScheme) -> str | None:
        if reason := held_elsewhere(scheme):
            return reason
        if scheme.activations:
            return f"it says nothing of activations, and those of {scheme} are INT8 beside {scheme.bits}-bit weights"
        if scheme.codebook or scheme.real_zero or scheme.permuted or scheme.outliers:
            return f"it holds integers with integer zero points in the order of the columns only, not {scheme}"
        return None if scheme.bits == 4 else f"it holds 4 bits only, and these are {scheme.bits}"

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        if n % 8:
            raise FormatError(f"awq: out_features {n} is not a multiple of 8")
        groups = scheme.groups(k)
        return {
            "qweight": ((k, n // 8), torch.int32),
            "qzeros": ((groups, n // 8), torch.int32),
            "scales": ((groups, n), dtype),
        }

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        if (reason := self.why_not(tensor.scheme)) is not None:
            raise FormatError(f"awq: {reason}")
        self.layout((tensor.scale.shape[0], tensor.in_features), tensor.scheme, tensor.scale.dtype)
        return {
            "qweight": _interleaved(tensor.codes().T),
            "qzeros": _interleaved(tensor.zeros().T),
            "scales": tensor.scale.T.contiguous(),
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        packed, scale, zero, k, size = self._parts(tensors)
        if scheme.symmetric and not bool((zero == 8).all()):
            raise FormatError("qzeros: not all zero points are 8, so zero_point in the config does not tell the truth")
        stored = None if scheme.symmetric else spread(zero, k, size, scheme)
        return settled(QuantizedTensor(packed, spread(scale, k, size, scheme), stored, scheme))

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        packed, scale, zero, k, size = self._parts(tensors)
        group = group_of(k, size, 1)
        return (unpack_short(packed, 4, k).float() - zero.float()[:, group]) * scale.float()[:, group]

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda _module, tensors: self._layer(tensors))

    def _layer(self, tensors: Mapping[str, Any]) -> Layer:
        if set(tensors) == {"scales"}:  # of an activation function, in models that AutoAWQ has no other place for them
            raise FormatError(
                "only scales: ScaledActivation of AutoAWQ, which divides activations by them, is not read"
            )
        n, k, _groups, size = self._facts(tensors)
        scheme = scheme_for(4, -1 if self.group_size == -1 else size, k, self.symmetric)
        note = "" if scheme else f"groups of {size} in rows of {k} do not divide into legal ones"
        return Layer((n, k), scheme, tensors["scales"].dtype, note)

    def config(self, schemes: Mapping[str, QuantScheme], left: Sequence[str]) -> dict[str, Any]:
        different = sorted({str(scheme) for scheme in schemes.values()})
        if len(different) != 1:
            raise FormatError(f"awq: all layers must have one scheme, and these have {', '.join(different)}")
        scheme = next(iter(schemes.values()))
        return {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": scheme.group_size,
            "zero_point": not scheme.symmetric, "modules_to_not_convert": list(left) or None,
        }  # fmt: skip

    def _facts(self, tensors: Mapping[str, Any]) -> tuple[int, int, int, int]:
        """N, K, G and the columns of a group."""
        if self.version == "gemm":
            groups, n = need(tensors, "scales", FLOATS, (None, None)).shape
            k = need(tensors, "qweight", (torch.int32,), (None, None)).shape[0]
        elif self.version == "gemv":
            n, k = need(tensors, "qweight", (torch.int32,), (None, None)).shape
            k *= 8
        else:
            rows, k = need(tensors, "qweight", (torch.int16,), (None, None)).shape
            n = rows * 4
        size = k if self.group_size == -1 else min(self.group_size, k)
        if not size and self.version == "gemm":
            size = k // groups
        if k % size:
            raise FormatError(f"quantization_config.group_size {size} does not divide {k} input features")
        if n % 8:
            raise FormatError(f"{n} output features are not a multiple of 8")
        if self.version == "gemm":
            need(tensors, "qweight", (torch.int32,), (k, n // 8))
            need(tensors, "qzeros", (torch.int32,), (k // size, n // 8))
            need(tensors, "scales", FLOATS, (k // size, n))
            return n, k, k // size, size
        groups = k // size
        wide = self.version == "gemv"
        axis = 1 if wide else 0
        padded = need(tensors, "scales", FLOATS, (n, None) if wide else (None, n)).shape[axis]
        if padded < groups or padded % 8:
            raise FormatError(f"scales has room for {padded} groups, {groups} rounded up to eights expected")
        if wide:
            need(tensors, "qzeros", (torch.int32,), (n, padded // 8))
        else:
            if k % 64:
                raise FormatError(f"{k} input features are not a multiple of 64")
            need(tensors, "qzeros", FLOATS, (padded, n))
        return n, k, groups, size

    def _parts(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Packed codes ``[N, ceil(K / 2)]``, scales ``[N, G]``, zero points uint8 ``[N, G]``, K, columns of a group."""
        n, k, groups, size = self._facts(tensors)
        qweight, qzeros, scales = (tensors[name] for name in self.suffixes)
        if self.version == "gemm":
            packed = transposed_codes(qweight, ORDER.tolist()).view(torch.uint8)[:, : (k + 1) // 2]
            scale, zero = scales.T.contiguous(), _columns(qzeros).T
        elif self.version == "gemv":
            packed, zero = (t.contiguous().view(torch.uint8) for t in (qweight, qzeros))
            scale, zero = scales[:, :groups].contiguous(), unpack(zero, 4)[:, :groups]
        else:
            packed, scale = pack(_fast(qweight, n, k), 4), scales[:groups].T.contiguous()
            zero = _recovered(scale, qzeros[:groups].T)
        check_scale("scales", scale)
        return packed, scale, zero.contiguous(), k, size


def _columns(words: Tensor) -> Tensor:
    """uint8 ``[R, N]`` of interleaved int32 words ``[R, N / 8]``."""
    return unpack(words.contiguous().view(torch.uint8), 4).unflatten(-1, (-1, 8))[..., ORDER.argsort()].flatten(-2)


def _interleaved(columns: Tensor) -> Tensor:
    """Inverse of `_columns`."""
    return pack(columns.unflatten(-1, (-1, 8))[..., ORDER].flatten(-2), 4).view(torch.int32)


def _fast(words: Tensor, n: int, k: int) -> Tensor:
    """uint8 ``[N, K]`` from int16 words ``[N / 4, K]``: a word holds four rows, with 32 columns in the order of a tensor core."""
    nibbles = unpack(words.contiguous().view(torch.uint8), 4)
    rows = nibbles.view(n // 4, k // 64, 4, 64).transpose(1, 2).reshape(n, k // 32, 4, 2, 4)
    pairs = rows.transpose(-1, -2).reshape(n, k // 32, 4, 4, 2)
    return pairs.transpose(2, 3).reshape(n, k)


def _recovered(scale: Tensor, shifted: Tensor) -> Tensor:
    """The integers z of ``shifted = -scale * z``, which was rounded to float16."""
    zero = (-shifted.float() / scale.float()).round()
    if not torch.equal(-(scale.float() * zero).to(shifted.dtype), shifted) or bool(((zero < 0) | (zero > 15)).any()):
        raise FormatError("qzeros: not -scale times integers from 0 to 15")
    return zero.to(torch.uint8)


FORMAT = AWQ
