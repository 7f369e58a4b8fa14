"""MLX, for mlx-lm on Apple's chips: affine codes with a scale and a bias for 32, 64 or 128 columns, ``w = q * scale + bias``.

Codes lie as here. The bias of a symmetric scheme is its scale times a power of two, which the dtype of the scale holds; that of
an asymmetric one is stored in float32, which holds the product of a scale of 16 bits and a zero point. Larger groups have their
scales repeated. Checkpoints of MLX itself are read to floating point, since their biases are multiples of no zero point.
(https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_quant.core.packing import unpack
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError, SchemeError
from hf_quant.formats import Called, Headers, Layer, Traits, Value, by_itself
from hf_quant.formats._common import FLOATS, check_scale, each_layer, held_elsewhere, integer, need, refused

WIDTHS = (2, 3, 4, 5, 6, 8)
SIZES = (32, 64, 128)
MODE = "affine"


@dataclass(frozen=True)
class MLX(Traits):
    """weight uint32 ``[N, K / 32 * bits]``, scales ``[N, G]``, biases ``[N, G]``.

    Args:
        bits: Of layers that have no entry.
        group_size: Of these layers.
        entries: Module to its bits and group size.
        schemes: Module to scheme, where this package has written it.
        columns: Input features of the layers that are read; None where they are not known.
    """

    bits: int = 4
    group_size: int = 64
    entries: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    schemes: Mapping[str, QuantScheme] = field(default_factory=dict)
    columns: int | None = None

    label: ClassVar[str] = "mlx"
    methods: ClassVar[tuple[str, ...]] = ("mlx",)
    converted_to: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")
    also_in: ClassVar[tuple[str, ...]] = ("quantization",)
    suffixes: ClassVar[tuple[str, ...]] = ("scales", "biases", "weight")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> MLX | None:
        plain = "quant_method" not in config and {"bits", "group_size"} <= config.keys()
        if config.get("quant_method") != "mlx" and not plain:
            return None
        if config.get("mode", MODE) != MODE:
            raise refused("mode", config["mode"], f"only {MODE} is read")
        entries = {
            name: (integer(entry, "bits", WIDTHS), integer(entry, "group_size", SIZES))
            for name, entry in config.items()
            if isinstance(entry, Mapping) and name not in ("schemes", "hf_quant")
        }
        schemes = config.get("schemes", {})
        if not isinstance(schemes, Mapping):
            raise refused("schemes", schemes, "must be an object")
        try:
            parsed = {name: QuantScheme.parse(slug) for name, slug in schemes.items()}
        except SchemeError as error:
            raise refused("schemes", schemes, str(error)) from None
        return cls(integer(config, "bits", WIDTHS), integer(config, "group_size", SIZES), entries, parsed)

    def of_columns(self, columns: int) -> MLX:
        return replace(self, columns=columns)

    def why_not(self, scheme: QuantScheme) -> str | None:
        if reason := held_elsewhere(scheme):
            return reason
        if scheme.foreign or scheme.outliers:
            return f"it holds integers in their order, with whole zero points and no outliers, and not these {scheme.bits}-bit codes"
        if scheme.activations:
            return f"its activations are floating point, and those beside these {scheme.bits}-bit codes are INT8"
        if 0 < scheme.group_size < min(SIZES):
            return f"its groups are of 32, 64 or 128 columns, and these of {scheme.group_size}, in {scheme.bits} bits"
        return None

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        groups = k // _size(scheme, k)
        biases = dtype if scheme.symmetric else torch.float32
        return {
            "weight": ((n, scheme.packed_bytes(k) // 4), torch.uint32),
            "scales": ((n, groups), dtype),
            "biases": ((n, groups), biases),
        }

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        scheme, k = tensor.scheme, tensor.in_features
        if (reason := self.why_not(scheme)) is not None:
            raise FormatError(f"mlx: {reason}")
        again = k // _size(scheme, k) // tensor.scale.shape[-1]
        biases = -tensor.zeros().float() * tensor.scale.float()
        return {
            "weight": tensor.qweight.contiguous().view(torch.uint32),
            "scales": tensor.scale.repeat_interleave(again, -1).contiguous(),
            "biases": biases.to(tensor.scale.dtype if scheme.symmetric else torch.float32).repeat_interleave(
                again, -1
            ),
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        _, k, _ = _facts(tensors, scheme.bits, None)
        scales, biases = tensors["scales"], tensors["biases"]
        check_scale("scales", scales)
        again = scales.shape[1] // max(1, scheme.groups(k))
        if not again or not bool((scales[:, ::again].repeat_interleave(again, 1) == scales).all()):
            raise FormatError(f"scales: {scales.shape[1]} a row are not those of {scheme}")
        scale = scales[:, ::again].contiguous()
        zero = -biases[:, ::again].float() / scale.float()
        whole = zero.round()
        if not bool(((zero - whole).abs() < 1e-3).all() & (whole >= 0).all() & (whole <= scheme.qmax).all()):
            raise FormatError(f"biases: they are not zero points of {scheme} times scales")
        if scheme.symmetric and not bool((whole == scheme.zero).all()):
            raise FormatError(f"biases: they are not those of {scheme}")
        packed = tensors["weight"].contiguous().view(torch.uint8)
        return QuantizedTensor(packed, scale, None if scheme.symmetric else whole.to(torch.uint8), scheme)

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scales, biases = need(tensors, "scales", FLOATS, (None, None)).float(), need(tensors, "biases", FLOATS).float()
        packed = need(tensors, "weight", (torch.uint32,), (None, None)).contiguous().view(torch.uint8)
        # of those that the config names, the bits that make these columns of these scales
        fitting = {
            bits for bits, size in {(self.bits, self.group_size), *self.entries.values()}
            if packed.shape[1] * 8 == scales.shape[1] * size * bits and self.columns in (None, scales.shape[1] * size)
        }  # fmt: skip
        if len(fitting) != 1 or biases.shape != scales.shape:
            raise FormatError(
                f"weight has shape {list(packed.shape)}, which fits {len(fitting)} entries of the config"
            )
        if not bool((scales.isfinite() & biases.isfinite()).all()):
            raise FormatError("scales and biases: some are not finite numbers")
        codes = unpack(packed, fitting.pop()).unflatten(-1, (scales.shape[1], -1)).float()
        return (codes * scales[..., None] + biases[..., None]).flatten(1)

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(
            headers, lambda module, tensors: self._layer(called(module), tensors) if _is_coded(tensors) else None
        )

    def _layer(self, names: Sequence[str], tensors: Mapping[str, Any]) -> Layer:
        bits, size = next((self.entries[name] for name in names if name in self.entries), (self.bits, self.group_size))
        n, k, dtype = _facts(tensors, bits, size)
        scheme = next((self.schemes[name] for name in names if name in self.schemes), None)
        if scheme is not None and (scheme.bits != bits or self.why_not(scheme) is not None):
            raise FormatError(f"{scheme} is not stored in {bits} bits in groups of {size}")
        return Layer((n, k), scheme, dtype, "" if scheme else "its biases are no multiples of its scales")

    def config(self, schemes: Mapping[str, QuantScheme], left: Sequence[str]) -> dict[str, Any]:
        kinds = {name: (scheme.bits, _columns(scheme)) for name, scheme in schemes.items()}
        (bits, size), _ = Counter(kinds.values()).most_common(1)[0]
        config: dict[str, Any] = {"quant_method": "mlx", "bits": bits, "group_size": size, "mode": MODE}
        config |= {name: {"bits": b, "group_size": s} for name, (b, s) in kinds.items() if (b, s) != (bits, size)}
        return config | {"schemes": {name: str(scheme) for name, scheme in schemes.items()}}


def _is_coded(tensors: Mapping[str, Any]) -> bool:
    return "scales" in tensors or ("weight" in tensors and tensors["weight"].dtype not in FLOATS)


def _size(scheme: QuantScheme, in_features: int) -> int:
    """`_columns`, where groups of the scheme divide a row."""
    if scheme.group_size != -1 and in_features % scheme.group_size:
        raise FormatError(f"groups of {scheme.group_size} do not divide {in_features} columns")
    return _columns(scheme)


def _columns(scheme: QuantScheme) -> int:
    """Columns that share a scale in the file: the largest legal group inside one of the scheme; 32 in whole rows."""
    return min(SIZES) if scheme.group_size == -1 else min(scheme.group_size, max(SIZES))


def _facts(tensors: Mapping[str, Any], bits: int, size: int | None) -> tuple[int, int, torch.dtype]:
    """N, K and the dtype of scales, of tensors that fit each other."""
    n, words = need(tensors, "weight", (torch.uint32,), (None, None)).shape
    if words % bits:
        raise FormatError(f"weight has rows of {words} words, which are no columns of {bits} bits")
    k = words * 32 // bits
    scales = need(tensors, "scales", FLOATS, (n, None if size is None else k // size))
    need(tensors, "biases", FLOATS, (n, scales.shape[1]))
    if k % scales.shape[1]:
        raise FormatError(f"scales has shape {list(scales.shape)} for {k} columns")
    return n, k, scales.dtype


FORMAT = MLX
