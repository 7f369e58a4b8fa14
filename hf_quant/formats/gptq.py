"""GPTQ checkpoints as AutoGPTQ, GPTQModel and AutoRound write them.

Version 1 (``checkpoint_format: gptq``) stores zero points minus one, version 2 stores them unchanged. ``desc_act`` means that
columns were quantized in the order of their activations, so that the columns of a group are scattered; ``g_idx`` has the group
of each column. Reading sorts the columns by group once, and the layer permutes its input instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.packing import pack, unpack
from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.core.words import transposed
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
    order_of,
    permuted,
    refused,
    scheme_for,
    settled,
    spread,
)

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a word of ones
VERSIONS = {"gptq": False, "gptq_v2": True}
AUTO_ROUND = {  # packing_format to version 2
    "auto_round:auto_gptq": False, "auto_round:gptq": False,
    "auto_round": True, "auto_round:gptqmodel": True, "auto_round:exllamav2": True,
}  # fmt: skip


@dataclass(frozen=True)
class GPTQ(Traits):
    """qweight int32 ``[K * bits / 32, N]``, scales ``[G, N]``, qzeros int32 ``[G, N * bits / 32]``, g_idx int32 ``[K]``.

    Args:
        v2: Whether zero points are stored unchanged, and not minus one.
        bits: Bits of the layers without an exception in the config.
        group_size: Their group size; -1 for whole rows, 0 for equal groups whose number the scales tell.
        symmetric: Whether all zero points are ``2 ** (bits - 1)``.
        desc_act: Whether columns were quantized in the order of their activations.
        mixed: Whether some layers may have other bits and groups.
    """

    v2: bool = False
    bits: int = 4
    group_size: int = 0
    symmetric: bool = True
    desc_act: bool = False
    mixed: bool = False

    label: ClassVar[str] = "gptq"
    methods: ClassVar[tuple[str, ...]] = ("gptq", "auto-round")
    converted_to: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    scales_16bit: ClassVar[bool] = True
    variant_fields: ClassVar[tuple[str, ...]] = ("packing_format", "checkpoint_format")
    config_file: ClassVar[str | None] = "quantize_config.json"  # of AutoGPTQ
    vllm: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> GPTQ | None:
        method = config.get("quant_method")
        if method == "gptq":
            stored = config.get("checkpoint_format") or config.get("format") or "gptq"
            if not isinstance(stored, str) or stored not in VERSIONS:
                raise refused("checkpoint_format", stored, f"only {' and '.join(VERSIONS)} are read")
            v2 = VERSIONS[stored]
        elif method in ("auto-round", "intel/auto-round") and str(config.get("packing_format")) in AUTO_ROUND:
            v2 = AUTO_ROUND[str(config["packing_format"])]
        else:
            return None
        symmetric, desc_act = (config.get(name, default) for name, default in (("sym", True), ("desc_act", False)))
        for name, value in (("sym", symmetric), ("desc_act", desc_act)):
            if value is not None and type(value) is not bool:
                raise refused(name, value, "must be true or false")
        size = integer(config, "group_size", range(-1, 1 << 20), 128)
        if size == 0:
            raise refused("group_size", size, "must be -1 or above zero")
        desc_act = desc_act and not config.get("static_groups")
        mixed = bool(config.get("dynamic") or config.get("extra_config"))
        return cls(v2, integer(config, "bits", BITS), size, symmetric is not False, bool(desc_act), mixed)

    @classmethod
    def writer(cls, schemes: Iterable[QuantScheme]) -> GPTQ:
        """Version 2 if there are zero points: version 1 cannot express a zero point of zero."""
        return cls(v2=not all(scheme.symmetric for scheme in schemes))

    def vllm_refusal(self, scheme: QuantScheme, *, marlin: bool) -> str | None:
        if scheme.bits not in (4, 8) or not scheme.symmetric:
            return f"GPTQ of 4 and 8 bits without zero points only, not {scheme}; compressed-tensors holds zero points"
        return None if marlin else f"GPTQ in groups of 32, 64, 128 or a row, not of {scheme.group_size}"

    def why_not(self, scheme: QuantScheme) -> str | None:
        if reason := held_elsewhere(scheme):
            return reason
        if scheme.activations:
            return f"it says nothing of activations, and those of {scheme} are INT8 beside {scheme.bits}-bit weights"
        if scheme.codebook or scheme.real_zero or scheme.outliers:
            return f"it holds integers with integer zero points only, and nothing beside the {scheme.bits}-bit codes"
        return None

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        if n * scheme.bits % 32:
            raise FormatError(f"gptq: out_features {n} in {scheme.bits} bits fill no whole words")
        groups = scheme.groups(k)
        return {
            "qweight": ((k * scheme.bits // 32, n), torch.int32),
            "qzeros": ((groups, n * scheme.bits // 32), torch.int32),
            "scales": ((groups, n), dtype),
            "g_idx": ((k,), torch.int32),
        }

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        if (reason := self.why_not(tensor.scheme)) is not None:
            raise FormatError(f"gptq: {reason}")
        (n, groups), k = tensor.scale.shape, tensor.in_features
        self.layout((n, k), tensor.scheme, tensor.scale.dtype)
        g_idx, qweight = group_of(k, k // groups, 1).int().to(tensor.scale.device), tensor.qweight
        if tensor.perm is not None:
            back = tensor.perm[0].argsort()
            g_idx, qweight = g_idx[back], pack(tensor.codes()[:, back], tensor.scheme.bits)
        return {
            "qweight": transposed(qweight.contiguous().view(torch.int32)),
            "qzeros": self._stored(tensor.zeros().T, tensor.scheme.bits),
            "scales": tensor.scale.T.contiguous(),
            "g_idx": g_idx,
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        _n, k, bits, groups = _facts(tensors)
        size = self._size(k, groups)
        check_scale("scales", tensors["scales"])
        zero = self._zeros(tensors["qzeros"], bits)
        if scheme.symmetric and not bool((zero == scheme.zero).all()):
            raise FormatError(
                f"qzeros: not all zero points are {scheme.zero}, as in a symmetric checkpoint of version "
                f"{1 + self.v2}: checkpoint_format or sym does not tell the truth"
            )
        packed, scale = (
            transposed(tensors["qweight"]).view(torch.uint8),
            spread(tensors["scales"].T, k, size, scheme),
        )
        quantized = QuantizedTensor(packed, scale, None if scheme.symmetric else spread(zero, k, size, scheme), scheme)
        if scheme.permuted and "g_idx" not in tensors:
            raise FormatError("g_idx is missing")
        order = self._order(tensors, k, groups)
        if order is not None and not scheme.permuted:
            raise FormatError("g_idx: the columns of a group lie scattered")
        if not scheme.permuted:
            return settled(quantized)
        return settled(permuted(quantized, torch.arange(k) if order is None else order))

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        _n, k, bits, groups = _facts(tensors)
        check_scale("scales", tensors["scales"])
        self._order(tensors, k, groups)
        group = tensors.get("g_idx", group_of(k, self._size(k, groups), 1)).long()
        codes = unpack(transposed(tensors["qweight"]).view(torch.uint8), bits).float()
        zero, scale = self._zeros(tensors["qzeros"], bits).float(), tensors["scales"].T.float()
        return (codes - zero[:, group]) * scale[:, group]

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda module, tensors: self._layer(module, tensors, value))

    def config(self, schemes: Mapping[str, QuantScheme], left: Sequence[str]) -> dict[str, Any]:
        default = Counter(schemes.values()).most_common(1)[0][0]
        dynamic: dict[str, Any] = {  # the first matching pattern applies
            f"+:^{re.escape(name)}$": {
                "bits": s.bits,
                "group_size": s.group_size,
                "sym": s.symmetric,
                "desc_act": s.permuted,
            }
            for name, s in schemes.items()
            if s != default
        }
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in left if name != "lm_head"}
        version = "gptq_v2" if self.v2 else "gptq"
        return {
            "quant_method": "gptq", "bits": default.bits, "group_size": default.group_size, "sym": default.symmetric,
            "desc_act": default.permuted, "lm_head": "lm_head" in schemes, "checkpoint_format": version,
            "format": version, "pack_dtype": "int32",
        } | ({"dynamic": dynamic} if dynamic else {})  # fmt: skip

    def _layer(self, module: str, tensors: Mapping[str, Any], value: Value) -> Layer:
        n, k, bits, groups = _facts(tensors)
        size = self._size(k, groups)
        if bits != self.bits and not self.mixed:
            raise FormatError(f"qzeros holds {bits}-bit zero points, quantization_config.bits is {self.bits}")
        scattered, symmetric = self.desc_act and groups > 1, self.symmetric
        if scattered and "g_idx" not in tensors:
            raise FormatError("g_idx is missing, and desc_act says that columns are out of order")
        g_idx = value(f"{module}.g_idx") if "g_idx" in tensors else None
        if g_idx is not None:  # only read in a thorough look; it tells the actual order
            scattered = self._order({"g_idx": g_idx}, k, groups) is not None
        qzeros = value(f"{module}.qzeros") if self.mixed else None
        if qzeros is not None:
            symmetric = bool((self._zeros(qzeros, bits) == 1 << (bits - 1)).all())
        scheme = scheme_for(bits, -1 if self.group_size == -1 else size, k, symmetric, permuted=scattered)
        note = "" if scheme else f"groups of {size} in rows of {k} do not divide into legal ones"
        return Layer((n, k), scheme, tensors["scales"].dtype, note)

    def _size(self, k: int, groups: int) -> int:
        """Columns of a stored group; the last one may have fewer."""
        size = k if self.group_size == -1 else min(self.group_size, k)
        if size and -(-k // size) == groups:
            return size
        if (self.mixed or not size) and k % groups == 0:
            return k // groups
        raise FormatError(f"scales has {groups} groups, quantization_config.group_size is {self.group_size}")

    def _order(self, tensors: Mapping[str, Tensor], k: int, groups: int) -> Tensor | None:
        return order_of("g_idx", tensors["g_idx"], groups, self._size(k, groups)) if "g_idx" in tensors else None

    def _zeros(self, qzeros: Tensor, bits: int) -> Tensor:
        """The zero points, uint8 ``[N, G]``."""
        by_word = not self.v2 and bits in ONES  # version 1 subtracts from whole words, with borrows between fields
        words = qzeros + ONES[bits] if by_word else qzeros
        zero = unpack(words.contiguous().view(torch.uint8), bits)
        if not self.v2 and not by_word:
            zero = (zero + 1) & ((1 << bits) - 1)
        return zero.T.contiguous()

    def _stored(self, zero: Tensor, bits: int) -> Tensor:
        """Inverse of `_zeros`, from ``[G, N]``."""
        if self.v2 or bits in ONES:
            words = pack(zero, bits).view(torch.int32)
            return words if self.v2 else words - ONES[bits]
        return pack((zero.int() - 1) & ((1 << bits) - 1), bits).view(torch.int32)


def _facts(tensors: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """N, K, bits and G, from shapes alone."""
    groups, n = need(tensors, "scales", FLOATS, (None, None)).shape
    words = need(tensors, "qzeros", (torch.int32,), (groups, None)).shape[1]
    bits = next((b for b in BITS if b * n == words * 32), None)
    if bits is None:
        raise FormatError(f"qzeros has {words} words for {n} columns of scales: no width of {BITS} gives that")
    rows = need(tensors, "qweight", (torch.int32,), (None, n)).shape[0]
    if rows * 32 % bits:
        raise FormatError(f"qweight has {rows} words a column, which {bits} bits do not fill")
    k = rows * 32 // bits
    if "g_idx" in tensors:
        need(tensors, "g_idx", (torch.int32, torch.int64), (k,))
    return n, k, bits, groups


FORMAT = GPTQ
