"""compressed-tensors: the format that vLLM, SGLang and the Hub's parameter counter read without this package.

Written as ``pack-quantized`` in every width, or as ``int-quantized`` where activations are INT8 and a row of 8 bits has one
scale. Read: packed integers of 2 to 8 bits (`_compressed_tensors_packing`); columns in another order (``weight_g_idx``, actorder
"group"); ``int-quantized`` and ``naive-quantized`` integers; and 8-bit floats, which are dequantized; MXFP4 and NVFP4 (`_fp4`).
Activations are rounded to symmetric INT8 if the config says so (by token, or with one stored scale), and stay in
floating point for any other rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.core.packing import pack
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Called, Headers, Layer, Traits, Value, by_itself
from hf_quant.formats._common import (
    FLOATS,
    IN_FLOAT,
    Globs,
    check_input_scale,
    check_scale,
    codes_of,
    each_layer,
    held_elsewhere,
    is_sequence,
    need,
    one_value,
    order_of,
    permuted,
    refused,
    scheme_for,
    settled,
    spread,
    times_blocks,
)
from hf_quant.formats._compressed_tensors_config import (
    FP4,
    INPUTS,
    LEGAL,
    Group,
    as_glob,
    check_fields,
    config_of,
    in_bytes,
    read_group,
    stored_as,
)
from hf_quant.formats._compressed_tensors_packing import (
    SHAPES,
    Layout,
    layout_of,
    stored_shape,
    zeros_of,
)
from hf_quant.formats._fp4 import GLOBAL, fp4_layer, read_fp4

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale")


@dataclass(frozen=True)
class CompressedTensors(Traits):
    """weight_packed int32 ``[N, K / 32 * bits]``, weight_scale ``[N, G]``, weight_shape int64 ``[2]``, and for asymmetric
    schemes weight_zero_point int32 ``[ceil(N * bits / 32), G]``, packed along N.

    Args:
        groups: Groups of the config, for reading; without one, the tensors of `write` are read.
    """

    groups: tuple[Group, ...] = ()

    label: ClassVar[str] = "compressed-tensors"
    methods: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    saved: ClassVar[bool] = True
    automatic: ClassVar[bool] = True
    converted_to: ClassVar[bool] = True
    vllm: ClassVar[bool] = True
    vllm_int8: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", GLOBAL, *ACTIVATIONS,
        "weight",
    )  # fmt: skip

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> CompressedTensors | None:
        if config.get("quant_method") != "compressed-tensors":
            return None
        check_fields("", config, LEGAL)
        sparsity = config.get("sparsity_config") or {}
        if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
            raise refused("sparsity_config", sparsity, "only dense weights are read")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise refused("config_groups", groups, "must be an object with at least one group")
        if not is_sequence(config.get("ignore") or []):
            raise refused("ignore", config["ignore"], "must be a list of names")
        parsed_groups = tuple(
            read_group(f"config_groups.{ascii(name)[1:-1]}", group) for name, group in groups.items()
        )
        if config.get("format") in FP4 and not any(group.fp4 for group in parsed_groups):
            raise refused("format", config["format"], "no group has 4-bit floats")
        counted = Counter(target for group in parsed_groups for target in group.targets)
        for target, count in counted.items():
            if count > 1:
                raise refused("config_groups.targets", target, "two groups have it")
        return cls(parsed_groups)

    def config_of_plan(
        self, default: QuantScheme, overrides: Mapping[str, QuantScheme], ignore: Sequence[str]
    ) -> dict[str, Any]:
        return config_of(default, overrides, ignore)

    def description(self, schemes: Iterable[QuantScheme]) -> str:
        return f"{self.label}, `{stored_as(schemes)}`"

    def elsewhere(self, schemes: Iterable[QuantScheme]) -> str:
        lines = "and the same lines."
        if not all(scheme.symmetric for scheme in schemes):
            lines = "and `from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))`."
        return f"Without hf-quant: `pip install compressed-tensors`, {lines}"

    def why_not(self, scheme: QuantScheme) -> str | None:
        if reason := held_elsewhere(scheme):
            return reason
        if scheme.codebook or scheme.real_zero:
            return "it holds integers with integer zero points only"
        if scheme.permuted:
            return "its readers no longer know columns in another order (weight_g_idx)"
        if scheme.activations not in (None, "token") and not (scheme.activations in INPUTS and in_bytes(scheme)):
            return f"of INT8 activations it holds those by row, and static ones beside W8A8 with one scale a row, not {scheme}"
        if scheme.outliers:
            return f"it has no place for outliers beside the {scheme.bits}-bit codes"
        return None

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        groups = scheme.groups(k)
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if in_bytes(scheme):
            tensors = {"weight": ((n, k), torch.int8), "weight_scale": ((n, 1), dtype)}
            tensors |= {} if scheme.symmetric else {"weight_zero_point": ((n, 1), torch.int8)}
            return tensors | ({"input_scale": ((1,), dtype)} if scheme.activations == "tensor" else {})
        tensors = {
            "weight_packed": ((n, scheme.packed_bytes(k) // 4), torch.int32),
            "weight_scale": ((n, groups), dtype),
            "weight_shape": ((2,), torch.int64),
        }
        if not scheme.symmetric:
            tensors["weight_zero_point"] = ((-(-n * scheme.bits // 32), groups), torch.int32)
        return tensors

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        if (reason := self.why_not(tensor.scheme)) is not None:
            raise FormatError(f"compressed-tensors: {tensor.scheme.bits} bits: {reason}")
        if in_bytes(tensor.scheme):
            return _unpacked(tensor)
        n, bits = tensor.scale.shape[0], tensor.scheme.bits
        tensors = {
            "weight_packed": tensor.qweight.contiguous().view(torch.int32),
            "weight_scale": tensor.scale,
            "weight_shape": torch.tensor([n, tensor.in_features]),
        }
        if tensor.zero_point is not None:
            padded = F.pad(tensor.zero_point.T, (0, -n % 32))  # [G, N], whole words
            words = pack(padded, bits).view(torch.int32)[:, : -(-n * bits // 32)]
            # .contiguous() would leave an axis of one with a stride that no view as bytes allows
            tensors["weight_zero_point"] = words.T.clone(memory_format=torch.contiguous_format)
        return tensors

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        if scheme.codebook:
            return read_fp4(tensors, scheme)
        if "weight_packed" in tensors:
            n, k = stored_shape(tensors)
            words = need(tensors, "weight_packed", (torch.int32,))
            layout = layout_of(words.shape, n, k, scheme.bits)
            packed = layout.packed(words, k)
        elif "weight" not in tensors:
            raise FormatError("neither weight_packed nor weight is there")
        else:
            n, k = need(tensors, "weight", (torch.int8,), (None, None)).shape
            layout = Layout(scheme.bits)
            codes = codes_of("weight", tensors["weight"], scheme)
            packed = codes if scheme.bits == 8 else pack(codes, scheme.bits)
        scale = _scale(tensors, n)
        groups = scale.shape[1]
        if scheme.groups(k) % groups:
            raise FormatError(f"weight_scale has {groups} groups for {k} input features, expected {scheme.groups(k)}")
        zero = None if scheme.symmetric else zeros_of(tensors, n, groups, scheme, layout)
        zero = None if zero is None else spread(zero, k, k // groups, scheme)
        quantized = QuantizedTensor(packed, spread(scale, k, k // groups, scheme), zero, scheme)
        if scheme.activations == "tensor":
            input_scale = one_value(tensors, "input_scale")
            check_input_scale("input_scale", input_scale)
            quantized = replace(quantized, input_scale=input_scale)
        if scheme.permuted and "weight_g_idx" not in tensors:
            raise FormatError("weight_g_idx is missing")
        order = _order(tensors, k, groups)
        if order is not None and not scheme.permuted:
            raise FormatError("weight_g_idx: the columns of a group lie scattered")
        if not scheme.permuted:
            return settled(quantized)
        return settled(permuted(quantized, torch.arange(k) if order is None else order))

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = need(tensors, "weight", (*FLOAT8, *FLOATS), (None, None))
        n, k = weight.shape
        scale = need(tensors, "weight_scale", FLOATS)
        check_scale("weight_scale", scale)
        # a tensor does not tell its group, but the shape of its scales does
        rows, across = _block(n, k, scale.shape, {group.block for group in self.groups if group.floats} or {None})
        return times_blocks(weight, scale.reshape(-(-n // rows), -(-k // across)), rows, across)

    def layers(self, headers: Headers, value: Value, called: Called = by_itself) -> dict[str, Layer]:
        return each_layer(headers, lambda m, t: self._layer(m, called(m), t, value) if _is_coded(t) else None)

    def config(self, schemes: Mapping[str, QuantScheme], left: Sequence[str]) -> dict[str, Any]:
        default = Counter(schemes.values()).most_common(1)[0][0]
        return config_of(default, {name: scheme for name, scheme in schemes.items() if scheme != default}, left)

    def _layer(self, module: str, names: Sequence[str], tensors: Mapping[str, Any], value: Value) -> Layer:
        group = self._group(names)
        if group.fp4:
            return fp4_layer(tensors, group.group_size, group.note)
        if "weight_packed" in tensors:
            need(tensors, "weight_packed", (torch.int32,), (None, None))
            need(tensors, "weight_shape", SHAPES, (2,))
            shape = value(f"{module}.weight_shape")
            assert shape is not None
            n, k = stored_shape({"weight_shape": shape})
            layout_of(tensors["weight_packed"].shape, n, k, group.bits)
        elif "weight" not in tensors:
            raise FormatError("neither weight_packed nor weight is there")
        else:
            n, k = need(tensors, "weight", FLOAT8 if group.floats else (torch.int8,), (None, None)).shape
        scale = need(tensors, "weight_scale", FLOATS)
        if group.floats:
            _block(n, k, scale.shape, {group.block})
            return Layer((n, k), None, scale.dtype, "8-bit floats")
        size = k if group.group_size == -1 else group.group_size
        if k % size:
            raise FormatError(f"group_size {size} does not divide {k} input features")
        if list(scale.shape) != [n, k // size] and (size != k or list(scale.shape) not in ([n], [1], [], [1, 1])):
            raise FormatError(f"weight_scale has shape {list(scale.shape)}, expected {[n, k // size]}")
        g_idx = value(f"{module}.weight_g_idx") if "weight_g_idx" in tensors else None
        scattered = "weight_g_idx" in tensors and k > size
        if g_idx is not None:
            scattered = _order({"weight_g_idx": g_idx}, k, k // size) is not None
        inputs, note = (None, IN_FLOAT) if scattered and group.activations else (group.activations, group.note)
        scheme = scheme_for(group.bits, group.group_size, k, group.symmetric, permuted=scattered, activations=inputs)
        if scheme is None:
            raise FormatError(f"groups of {size} in rows of {k} do not divide into legal ones")
        if not group.symmetric:
            need(tensors, "weight_zero_point", (torch.int32, torch.int8))
        return Layer((n, k), scheme, scale.dtype, note)

    def _group(self, names: Sequence[str]) -> Group:
        """The group of a module: names precede patterns, and patterns precede classes."""
        if len(self.groups) == 1:  # of which every quantized layer must be a member
            return self.groups[0]
        plain, patterns, globs = self._targets
        group = next((plain[name] for name in names if name in plain), None)
        if group is None and (place := globs.first(names)) is not None:
            group = patterns[place]
        group = group or plain.get("Linear")
        if group is None:
            raise FormatError("no group of quantization_config is for it")
        return group

    @cached_property
    def _targets(self) -> tuple[dict[str, Group], list[Group], Globs]:
        """Groups by plain target, and groups of the patterns in the order they are tried."""
        named = {target: group for group in self.groups for target in group.targets}
        patterns = sorted(target for target in named if target.startswith("re:"))
        globs = Globs("config_groups.targets", [as_glob("config_groups.targets", target) for target in patterns])
        return (
            {target: group for target, group in named.items() if not target.startswith("re:")},
            [named[target] for target in patterns],
            globs,
        )


def _unpacked(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Tensors with one code a byte: ``int-quantized``."""
    tensors = {"weight": (tensor.qweight ^ 0x80).view(torch.int8), "weight_scale": tensor.scale}
    if tensor.zero_point is not None:
        tensors["weight_zero_point"] = (tensor.zero_point ^ 0x80).view(torch.int8)
    return tensors if tensor.input_scale is None else tensors | {"input_scale": tensor.input_scale}


def _block(n: int, k: int, shape: Sequence[int], blocks: Collection[tuple[int, int] | None]) -> tuple[int, int]:
    """Rows and columns that share a scale in a weight ``[N, K]``: the one of ``blocks`` that ``shape`` fits; None means rows."""
    fitting = set()
    for block in blocks:
        if block is not None:
            rows, across = min(block[0], n), min(block[1], k)
            if list(shape) == [-(-n // rows), -(-k // across)]:
                fitting.add((rows, across))
        elif list(shape) in ([n, 1], [n], [1, 1], [1], []):
            fitting.add((n if math.prod(shape) == 1 else 1, k))
    if len(fitting) != 1:
        raise FormatError(f"weight_scale has shape {list(shape)}, which fits {len(fitting)} groups of the config")
    return fitting.pop()


def _scale(tensors: Mapping[str, Tensor], n: int) -> Tensor:
    """Scales ``[N, G]`` from one per group, one per row, or a single one."""
    scale = need(tensors, "weight_scale", FLOATS)
    check_scale("weight_scale", scale)
    if scale.numel() == 1:
        return scale.view(1, 1).expand(n, 1).contiguous()
    if scale.ndim == 1:  # some programs omit the group axis for a single group
        scale = scale[:, None]
    return need({"weight_scale": scale}, "weight_scale", FLOATS, (n, None))


def _order(tensors: Mapping[str, Tensor], k: int, groups: int) -> Tensor | None:
    if "weight_g_idx" not in tensors:
        return None
    g_idx = need(tensors, "weight_g_idx", (torch.int32, torch.int64), (k,))
    if bool((g_idx == -1).all()):  # marks columns in their natural order
        return None
    return order_of("weight_g_idx", g_idx, groups, k // groups)


def _is_coded(tensors: Mapping[str, Any]) -> bool:
    dense = "weight" in tensors and tensors["weight"].dtype in FLOATS
    if dense and ("weight_scale" in tensors or "weight_packed" in tensors):
        raise FormatError("weight is in floating point, and codes or scales of it stand beside it")
    return not dense


FORMAT = CompressedTensors
