"""The ``quantization_config`` of compressed-tensors: its groups, their fields, and the modules they apply to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_quant.core.scheme import WIDTHS, QuantScheme
from hf_quant.errors import FormatError
from hf_quant.formats._common import (
    IN_FLOAT,
    integer,
    is_sequence,
    refused,
)

INPUTS = {  # our names of activations, as fields of this format
    "token": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "tensor": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
}
MIXED = "mixed-precision"
FP4 = ("mxfp4-pack-quantized", "nvfp4-pack-quantized")


@dataclass(frozen=True)
class Group:
    """A config group, in our words."""

    targets: tuple[str, ...]
    bits: int
    group_size: int  # -1 for whole rows
    symmetric: bool
    floats: bool  # 8-bit floats, not integers
    block: tuple[int, int] | None  # rows and columns that share a scale, if there are several rows
    activations: str | None  # as in a `QuantScheme`
    note: str  # on activations that stay in floating point although the config quantizes them
    fp4: bool = False  # 4-bit floats


def in_bytes(scheme: QuantScheme) -> bool:
    """Whether its codes are stored one a byte: what engines take for the products of INT8 matrices."""
    return scheme.activations is not None and (scheme.bits, scheme.group_size) == (8, -1)


def stored_as(schemes: Iterable[QuantScheme]) -> str:
    """The format's name for the way `write` stores weights in these schemes, all of them together."""
    names = {"int-quantized" if in_bytes(scheme) else "pack-quantized" for scheme in schemes}
    return names.pop() if len(names) == 1 else MIXED


def config_of(default: QuantScheme, overrides: Mapping[str, QuantScheme], ignore: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in this format.

    Args:
        default: Scheme of every linear layer not named below.
        overrides: Module name, or glob of ``*`` and ``?``, to scheme.
        ignore: Names or globs of the linear layers left in floating point.

    Raises:
        FormatError: This format cannot express a glob.
    """
    named: dict[QuantScheme, list[str]] = {}
    for name, scheme in overrides.items():
        if scheme != default:
            named.setdefault(scheme, []).append(as_target(name))
    # names precede classes in any order; but parts of transformers look at the first group only
    groups = [(default, ["Linear"]), *named.items()]
    config_groups = {f"group_{i}": written_group(scheme, targets) for i, (scheme, targets) in enumerate(groups)}
    stored = stored_as(scheme for scheme, _ in groups)
    if stored == MIXED:
        for (scheme, _), group in zip(groups, config_groups.values(), strict=True):
            group["format"] = stored_as([scheme])
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": [as_target(name) for name in ignore],
        "kv_cache_scheme": None,
    }


def written_group(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    whole_row = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else scheme.group_size,
        "dynamic": False,
    }
    inputs = INPUTS[scheme.activations] if scheme.activations else None
    return {"targets": targets, "weights": weights, "input_activations": inputs, "output_activations": None}


# fields and the values that have no effect here
LEGAL: dict[str, tuple[Any, ...]] = {
    "format": ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", *FP4, MIXED),
    "quantization_status": ("compressed", "frozen", None),
    "kv_cache_scheme": (None, {}),
    "transform_config": (None, {}),
    "moe_sparsity_config": (None,),
}
LEGAL_IN_GROUP: dict[str, tuple[Any, ...]] = {
    "output_activations": (None,),
    "format": ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", *FP4, None),
}
LEGAL_IN_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "type": ("int", "float", None),
    "dynamic": (False, None),
    "symmetric": (True, False, None),
    "strategy": ("group", "channel", "tensor", "block", "tensor_group"),
}


def check_fields(prefix: str, fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a field whose value is not ``allowed``; ``prefix`` is the path of the fields."""
    for name, values in allowed.items():
        value = fields.get(name)
        if not any(type(value) is type(legal) and value == legal for legal in values):
            raise refused(f"{prefix}{name}", value, f"only {' or '.join(map(str, values))} is read")


def read_group(where: str, group: Any) -> Group:
    """A config group, checked; ``where`` is its path for messages."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise refused(f"{where}.weights", weights, "must be an object")
    check_fields(f"{where}.", group, LEGAL_IN_GROUP)
    check_fields(f"{where}.weights.", weights, LEGAL_IN_WEIGHTS)
    targets = group.get("targets")
    if not is_sequence(targets):
        raise refused(f"{where}.targets", targets, "must be a list of names")
    if weights.get("type") == "float" and weights.get("num_bits") == 4:
        return _read_fp4(where, group, weights, tuple(targets))
    if group.get("format") in FP4:
        raise refused(f"{where}.format", group["format"], "its weights are no 4-bit floats")
    floats, strategy, block = weights.get("type") == "float", weights["strategy"], weights.get("block_structure")
    if strategy == "tensor_group":
        raise refused(f"{where}.weights.strategy", strategy, "only 4-bit floats (NVFP4) are read in it")
    try:
        bits = integer(weights, "num_bits", (8,) if floats else WIDTHS, 8 if floats else None)
        size = integer(weights, "group_size", range(1, 1 << 20)) if strategy == "group" else -1
    except FormatError as error:
        raise FormatError(
            str(error).replace("quantization_config.", f"quantization_config.{where}.weights.")
        ) from None
    if floats and strategy == "group":
        raise refused(f"{where}.weights.strategy", strategy, "of floats only channel, tensor and block are read")
    if strategy == "block":
        sizes = isinstance(block, list) and len(block) == 2 and all(type(b) is int and 0 < b < 1 << 20 for b in block)
        if not floats or not sizes:
            raise refused(f"{where}.weights.block_structure", block, "only two sizes, and only of floats, are read")
    shared = (block[0], block[1]) if strategy == "block" and block else None
    activations, note = _read_inputs(where, group.get("input_activations"), floats)
    return Group(tuple(targets), bits, size, weights.get("symmetric") is not False, floats, shared, activations, note)


def _read_fp4(where: str, group: Mapping[str, Any], weights: Mapping[str, Any], targets: tuple[str, ...]) -> Group:
    """MXFP4 or NVFP4, which differ in their group size."""
    size, kinds = weights.get("group_size"), {32: "group", 16: "tensor_group"}
    if weights.get("symmetric") is False:
        raise refused(f"{where}.weights.symmetric", False, "4-bit floats have no zero points")
    if type(size) is not int or kinds.get(size) != weights["strategy"]:
        raise refused(
            f"{where}.weights.group_size", size, "4-bit floats are read in groups of 32 (MXFP4) and 16 (NVFP4)"
        )
    _, note = _read_inputs(where, group.get("input_activations"), True)
    return Group(targets, 4, size, True, False, None, None, note, fp4=True)


def _read_inputs(where: str, inputs: Any, floats: bool) -> tuple[str | None, str]:
    """The rounding of activations, and a note on what is not followed."""
    if inputs is None:
        return None, ""
    if not isinstance(inputs, Mapping):
        raise refused(f"{where}.input_activations", inputs, "must be an object")
    for name, expected in INPUTS.items():
        if (
            not floats
            and all(inputs.get(field, expected[field]) == expected[field] for field in expected)
            and "strategy" in inputs
        ):
            return name, ""
    return None, IN_FLOAT


_PLAIN = re.compile(r"[\w.\-/]+", re.ASCII)
_TOKEN = re.compile(
    r"\.\*|\\\.|[\w\-/.]", re.ASCII
)  # all that a pattern from a checkpoint may contain; it is never compiled


def as_target(name: str) -> str:
    """A module name unchanged; a glob as the pattern that matches the same names."""
    if _PLAIN.fullmatch(name):
        return name
    if not re.fullmatch(r"[\w.\-/*?]+", name, re.ASCII):
        raise FormatError(f"compressed-tensors: modules cannot be named by {ascii(name)[:80]}")
    spelled = {"*": ".*", "?": ".", ".": r"\."}
    return "re:" + "".join(spelled.get(letter, letter) for letter in name) + "$"


def as_glob(field: str, name: str) -> str:
    """A name unchanged; a regular expression only if it is a plain glob, since any other could hang the matcher.

    A pattern matches at the start of a name but not necessarily to its end, so ``*`` is appended unless it ends in ``$``.
    """
    pattern = name[3:].removeprefix("^")
    body = pattern.removesuffix("$")
    tokens = _TOKEN.findall(body)
    if "".join(tokens) != body:
        raise refused(field, name, "of regular expressions only literals, '.', '.*' and '$' at the end are read")
    glob = "".join({".*": "*", ".": "?", r"\.": "."}.get(token, token) for token in tokens)
    return glob if body != pattern or glob.endswith("*") else f"{glob}*"
