"""compressed-tensors ``pack-quantized``: what vLLM, SGLang and the Hub's parameter counter read without this package."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.errors import FormatError, SchemeError
from hf_quant.packing import pack, unpack
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import QuantizedTensor


class CompressedTensors:
    """weight_packed int32 ``[N, K / 32 * bits]``, weight_scale ``[N, G]``, weight_shape int64 ``[2]``, and for asymmetric
    schemes weight_zero_point int32 ``[ceil(N * bits / 32), G]``, packed along N."""

    suffixes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def why_not(self, scheme: QuantScheme) -> str | None:
        if scheme.bits not in (4, 8):
            return f"its {scheme.bits}-bit packing differs between its versions"
        return None

    def layout(
        self, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = shape
        groups = scheme.groups(k)
        made = {
            "weight_packed": ((n, scheme.packed_bytes(k) // 4), torch.int32),
            "weight_scale": ((n, groups), dtype),
            "weight_shape": ((2,), torch.int64),
        }
        if not scheme.symmetric:
            made["weight_zero_point"] = ((-(-n * scheme.bits // 32), groups), torch.int32)
        return made

    def write(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        n, bits = tensor.scale.shape[0], tensor.scheme.bits
        made = {
            "weight_packed": tensor.qweight.contiguous().view(torch.int32),
            "weight_scale": tensor.scale,
            "weight_shape": torch.tensor([n, tensor.in_features]),
        }
        if tensor.zero_point is not None:
            padded = F.pad(tensor.zero_point.T, (0, -n % 32))  # [G, N], whole words
            words = pack(padded, bits).view(torch.int32)[:, : -(-n * bits // 32)]
            made["weight_zero_point"] = words.T.contiguous()
        return made

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        wanted = [s for s in self.suffixes if s != "weight_zero_point" or not scheme.symmetric]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise FormatError(f"compressed-tensors: no {missing}")
        words, scale = tensors["weight_packed"], tensors["weight_scale"]
        n, k = words.shape[0], words.shape[1] * 32 // scheme.bits
        if tensors["weight_shape"].tolist() != [n, k]:
            raise FormatError(
                f"compressed-tensors: weight_shape {tensors['weight_shape'].tolist()}, codes are {[n, k]}"
            )
        if scale.ndim == 1:  # some writers leave out the group axis where there is one group
            scale = scale[:, None]
        zero = None
        if not scheme.symmetric:
            packed = tensors["weight_zero_point"].T.contiguous()
            whole = F.pad(packed, (0, -(-n // 32) * scheme.bits - packed.shape[1]))
            zero = unpack(whole.view(torch.uint8), scheme.bits)[:, :n].T.contiguous()
        return QuantizedTensor(words.contiguous().view(torch.uint8), scale, zero, scheme)


def config_of(default: QuantScheme, overrides: Mapping[str, QuantScheme], ignore: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in this format.

    Args:
        default: Scheme of every linear layer not named below.
        overrides: Module name to scheme.
        ignore: Names of the linear layers left in floating point.
    """
    named: dict[QuantScheme, list[str]] = {}
    for name, scheme in overrides.items():
        if scheme != default:
            named.setdefault(scheme, []).append(name)
    groups = [*named.items(), (default, ["Linear"])]  # names first: readers take the first target that matches
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(scheme, targets) for i, (scheme, targets) in enumerate(groups)},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _group(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    whole_row = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else scheme.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def plan_of(config: Mapping[str, Any]) -> tuple[QuantScheme, dict[str, QuantScheme], list[str]]:
    """Inverse of `config_of`: default scheme, overrides by glob, globs of layers left alone.

    Raises:
        FormatError: A field holds what this package cannot run; the message names it.
    """
    if config.get("format") != "pack-quantized":
        raise _refused("format", config.get("format"), "only pack-quantized is read")
    if config.get("kv_cache_scheme"):
        raise _refused("kv_cache_scheme", config["kv_cache_scheme"], "not supported")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused("config_groups", groups, "must be an object with at least one group")
    default, overrides = None, {}
    for name, group in groups.items():
        where = f"config_groups.{name}"
        scheme = _scheme(where, group)
        for target in _list(f"{where}.targets", group.get("targets")):
            if target == "Linear":
                default = scheme
            else:
                overrides[_glob(f"{where}.targets", target)] = scheme
    if default is None:
        raise _refused("config_groups", sorted(groups), "no group targets 'Linear'")
    return default, overrides, [_glob("ignore", name) for name in _list("ignore", config.get("ignore") or [])]


def _scheme(where: str, group: Any) -> QuantScheme:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _refused(f"{where}.weights", weights, "must be an object")
    for field in ("input_activations", "output_activations"):
        if group.get(field):
            raise _refused(f"{where}.{field}", group[field], "quantized activations are not supported")
    for field, legal in (("type", "int"), ("dynamic", False), ("actorder", None), ("block_structure", None)):
        if weights.get(field, legal) != legal:
            raise _refused(f"{where}.weights.{field}", weights[field], f"only {legal} is read")
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel"):
        raise _refused(f"{where}.weights.strategy", strategy, "only group and channel are read")
    size = -1 if strategy == "channel" else weights.get("group_size")
    try:
        made = QuantScheme(weights.get("num_bits"), size, weights.get("symmetric", True))  # type: ignore[arg-type]
    except SchemeError as error:
        raise FormatError(f"quantization_config.{where}.weights: {error}") from None
    if (reason := CompressedTensors().why_not(made)) is not None:
        raise _refused(f"{where}.weights.num_bits", made.bits, reason)
    return made


def _list(field: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _refused(field, value, "must be a list of names")
    return value


def _glob(field: str, name: str) -> str:
    """A name as it is; a regular expression only if it is a plain glob: a stranger's could hang the matcher."""
    if not name.startswith("re:"):
        return name
    pattern = name[3:].replace(".*", "*").replace(r"\.", ".")
    if not re.fullmatch(r"[\w.*-]+", pattern):
        raise _refused(field, name, "only '.*' is allowed in a regular expression")
    return pattern


def _refused(field: str, value: Any, reason: str) -> FormatError:
    return FormatError(f"quantization_config.{field} {ascii(value)[:80]}: {reason}")


FORMAT = CompressedTensors
