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
from hf_quant.scheme import MULTIPLE, QuantScheme
from hf_quant.tensor import QuantizedTensor


class CompressedTensors:
    """weight_packed int32 ``[N, K / 32 * bits]``, weight_scale ``[N, G]``, weight_shape int64 ``[2]``, and for asymmetric
    schemes weight_zero_point int32 ``[ceil(N * bits / 32), G]``, packed along N."""

    suffixes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def why_not(self, scheme: QuantScheme) -> str | None:
        if scheme.bits not in (4, 8):
            return f"its {scheme.bits}-bit packing differs between its versions"
        if scheme.outliers:
            return f"it has no place for outliers beside the {scheme.bits}-bit codes"
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
        _check_bits(tensor.scheme)
        n, bits = tensor.scale.shape[0], tensor.scheme.bits
        made = {
            "weight_packed": tensor.qweight.contiguous().view(torch.int32),
            "weight_scale": tensor.scale,
            "weight_shape": torch.tensor([n, tensor.in_features]),
        }
        if tensor.zero_point is not None:
            padded = F.pad(tensor.zero_point.T, (0, -n % 32))  # [G, N], whole words
            words = pack(padded, bits).view(torch.int32)[:, : -(-n * bits // 32)]
            # .contiguous() would leave an axis of one with a stride that no view as bytes allows
            made["weight_zero_point"] = words.T.clone(memory_format=torch.contiguous_format)
        return made

    def read(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        _check_bits(scheme)
        wanted = [s for s in self.suffixes if s != "weight_zero_point" or not scheme.symmetric]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise FormatError(f"compressed-tensors: no {missing}")
        n, k = _stored_shape(tensors["weight_shape"])
        words, scale = tensors["weight_packed"], tensors["weight_scale"]
        if scale.ndim == 1:  # some writers leave out the group axis where there is one group
            scale = scale[:, None]
        try:
            layout = self.layout((n, k), scheme, scale.dtype)
        except SchemeError as error:
            raise FormatError(f"compressed-tensors: weight_shape {[n, k]}: {error}") from None
        for name, (shape, dtype) in layout.items():
            _check(name, scale if name == "weight_scale" else tensors[name], shape, dtype)
        zero = None
        if not scheme.symmetric:
            packed = tensors["weight_zero_point"].T.contiguous()
            whole = F.pad(packed, (0, -(-n // 32) * scheme.bits - packed.shape[1]))
            zero = unpack(whole.view(torch.uint8), scheme.bits)[:, :n].T.contiguous()
        return QuantizedTensor(words.contiguous().view(torch.uint8), scale, zero, scheme)


def _check_bits(scheme: QuantScheme) -> None:
    reason = CompressedTensors().why_not(scheme)
    if reason is not None:
        raise FormatError(f"compressed-tensors: {scheme.bits} bits: {reason}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise FormatError(f"compressed-tensors: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype != dtype or (name == "weight_scale" and not dtype.is_floating_point):
        raise FormatError(f"compressed-tensors: {name} has dtype {tensor.dtype}")


def _stored_shape(stored: Tensor) -> tuple[int, int]:
    """N and K, as the checkpoint says them."""
    _check("weight_shape", stored, (2,), torch.int64)
    n, k = (int(size) for size in stored)
    if n < 1 or k < 1 or k % MULTIPLE:
        raise FormatError(f"compressed-tensors: weight_shape {[n, k]}: in_features must be a multiple of {MULTIPLE}")
    return n, k


def config_of(default: QuantScheme, overrides: Mapping[str, QuantScheme], ignore: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in this format.

    Args:
        default: Scheme of every linear layer not named below.
        overrides: Module name, or glob of ``*`` and ``?``, to scheme.
        ignore: Names or globs of the linear layers left in floating point.

    Raises:
        FormatError: A glob cannot be said in this vocabulary.
    """
    named: dict[QuantScheme, list[str]] = {}
    for name, scheme in overrides.items():
        if scheme != default:
            named.setdefault(scheme, []).append(_target(name))
    # a name counts before a class wherever it stands; some of transformers looks at the first group only
    groups = [(default, ["Linear"]), *named.items()]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(scheme, targets) for i, (scheme, targets) in enumerate(groups)},
        "ignore": [_target(name) for name in ignore],
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
    if not isinstance(config, Mapping):
        raise FormatError(f"quantization_config must be an object, got {ascii(config)[:80]}")
    _only("", config, _ONLY)
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise _refused("sparsity_config", sparsity, "only dense weights are read")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused("config_groups", groups, "must be an object with at least one group")
    schemes: dict[str, QuantScheme] = {}
    for name, group in groups.items():
        where = f"config_groups.{ascii(name)[1:-1]}"
        scheme = _scheme(where, group)
        for target in _list(f"{where}.targets", group.get("targets")):
            if schemes.setdefault(target, scheme) != scheme:
                raise _refused(f"{where}.targets", target, "another group has it too")
    default = schemes.pop("Linear", None)
    if default is None:
        raise _refused("config_groups", sorted(groups), "no group targets 'Linear'")
    # the library prefers an exact name, then patterns in the order of their text, then classes
    ordered = sorted(schemes, key=lambda target: ("re:" in target, target))
    overrides = {_glob("config_groups.targets", target): schemes[target] for target in ordered}
    return default, overrides, [_glob("ignore", name) for name in _list("ignore", config.get("ignore") or [])]


# field to the values that change nothing here
_ONLY: dict[str, tuple[Any, ...]] = {
    "quant_method": ("compressed-tensors",),
    "format": ("pack-quantized",),
    "quantization_status": ("compressed", "frozen", None),
    "kv_cache_scheme": (None, {}),
    "transform_config": (None, {}),
    "moe_sparsity_config": (None,),
}
_ONLY_IN_GROUP: dict[str, tuple[Any, ...]] = {
    "input_activations": (None,),
    "output_activations": (None,),
    "format": ("pack-quantized", None),
}
_ONLY_IN_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "type": ("int", None),
    "dynamic": (False, None),
    "actorder": (None, False, "weight", "static"),  # the last two: the order of quantizing, not of storing
    "block_structure": (None,),
}


def _only(prefix: str, found: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in allowed.items():
        value = found.get(name)
        if not any(type(value) is type(legal) and value == legal for legal in values):
            raise _refused(f"{prefix}{name}", value, f"only {' or '.join(map(str, values))} is read")


def _scheme(where: str, group: Any) -> QuantScheme:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _refused(f"{where}.weights", weights, "must be an object")
    _only(f"{where}.", group, _ONLY_IN_GROUP)
    _only(f"{where}.weights.", weights, _ONLY_IN_WEIGHTS)
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


_PLAIN = re.compile(r"[\w.\-/]+", re.ASCII)
_TOKEN = re.compile(r"\.\*|\\\.|[\w\-/.]", re.ASCII)  # what a stranger's pattern may be made of; it is never compiled


def _target(name: str) -> str:
    """A module name as it is; a glob as the pattern that matches the same names."""
    if _PLAIN.fullmatch(name):
        return name
    if not re.fullmatch(r"[\w.\-/*?]+", name, re.ASCII):
        raise FormatError(f"compressed-tensors: modules cannot be named by {ascii(name)[:80]}")
    spelled = {"*": ".*", "?": ".", ".": r"\."}
    return "re:" + "".join(spelled.get(letter, letter) for letter in name) + "$"


def _glob(field: str, name: str) -> str:
    """A name as it is; a regular expression only if it is a plain glob: a stranger's could hang the matcher.

    A pattern matches from the start of a name but may end before its end, so without a ``$`` a ``*`` is appended.
    """
    if not name.startswith("re:"):
        is_class = name in ("Linear", "Module") or (name[:1].isupper() and field != "ignore")
        if is_class or not _PLAIN.fullmatch(name):
            raise _refused(field, name, "not the name of a module")
        return name
    pattern = name[3:].removeprefix("^")
    body = pattern.removesuffix("$")
    tokens = _TOKEN.findall(body)
    if "".join(tokens) != body:
        raise _refused(field, name, "of regular expressions only literals, '.', '.*' and '$' at the end are read")
    made = "".join({".*": "*", ".": "?", r"\.": "."}.get(token, token) for token in tokens)
    return made if body != pattern or made.endswith("*") else f"{made}*"


def _refused(field: str, value: Any, reason: str) -> FormatError:
    return FormatError(f"quantization_config.{field} {ascii(value)[:80]}: {reason}")


FORMAT = CompressedTensors
