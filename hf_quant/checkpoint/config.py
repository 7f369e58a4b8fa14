"""Checks config.json: no number may make building the model endless, and no field may name code elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_quant.disk.paths import inside, size_of_regular_file
from hf_quant.disk.strict_json import MAX_BYTES, MAX_VALUES, parsed, shown
from hf_quant.errors import CheckpointError

MAX_CONFIG = 500_000  # values in config.json
SIZES_OF = {  # fields of config.json and their range; zero where a model may have none (experts, dimensions with positions)
    "num_hidden_layers": (1, 1000),
    "n_layer": (1, 1000),
    "n_layers": (1, 1000),
    "num_layers": (1, 1000),
    "hidden_size": (1, 2**20),
    "n_embd": (1, 2**20),
    "d_model": (1, 2**20),
    "intermediate_size": (0, 2**22),
    "moe_intermediate_size": (0, 2**22),
    "vocab_size": (1, 2**24),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "n_head": (1, 2**14),
    "head_dim": (0, 2**16),
    "num_experts": (0, 2**16),
    "num_local_experts": (0, 2**16),
    "n_routed_experts": (0, 2**16),
}
MOST = (  # limits of other fields with such names, where they hold an integer
    (re.compile(r"(.*_)?(layers?|depth)"), 1000),
    (re.compile(r"(.*_)?experts"), 2**16),
    (re.compile(r"n_positions|.*max_.*positions?(_embeddings)?"), 2**26),
)
INNERMOST = 4  # depth to which configs of parts are checked
_PLAIN = re.compile(
    r"[a-z0-9_]+|None|\{.*\}", re.DOTALL
)  # names of attention implementations; a kernel on the Hub has a slash
FIELDS = ("quantization_config", "compression_config")  # of config.json; the second one in older compressed-tensors


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a local folder.

    Raises:
        CheckpointError: It is damaged, too large, or outside of the folder.
    """
    path = inside(folder, name)
    size = size_of_regular_file(path, name)
    if size > MAX_BYTES:
        raise CheckpointError(f"{name}: {size} bytes, the limit is {MAX_BYTES}")
    return parsed(path.read_bytes(), name, values=MAX_CONFIG if name == "config.json" else MAX_VALUES)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a local folder.

    Raises:
        CheckpointError: It is damaged, or a number in it would make building the model endless; names the field.
    """
    config = read_json(folder, "config.json")
    check_config(config)
    return config


def check_config(config: Mapping[str, Any], where: str = "") -> None:
    """Refuse numbers that would make building the model endless, and a ``quantization_config`` that is not an object.

    Args:
        config: config.json.
        where: For an inner config, its name and a dot.

    Raises:
        CheckpointError: Names the field.
    """
    if not where:
        _check_numbers("", dict(config))
    for key, value in config.items():
        for item in _values_of(value):
            _check_size(f"{where}{key}", key, item)
        if key.endswith(("attn_implementation", "experts_implementation")) and not _PLAIN.fullmatch(str(value)):
            raise CheckpointError(
                f"config.json: {where}{key} {shown(value)}: kernels from elsewhere are code, and not run"
            )
    for name in FIELDS:
        if (quantization := config.get(name)) is not None and not isinstance(quantization, dict):
            raise CheckpointError(f"config.json: {where}{name} must be an object, got {shown(quantization)}")
    for key, value in config.items():
        if where.count(".") < INNERMOST and key.endswith("_config") and isinstance(value, dict):
            check_config(value, f"{where}{key}.")


def _values_of(value: Any) -> list[Any]:
    """The values of a field: one, or one for each layer, or one for each part of the model."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]


def _check_numbers(field: str, value: Any) -> None:
    """Refuse NaN; some models have infinite limits."""
    if value != value:
        raise CheckpointError(f"config.json: {shown(field)[1:-1]} is NaN")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        _check_numbers(f"{field}.{key}" if field else str(key), item)


def _check_size(field: str, key: str, value: Any) -> None:
    if key in SIZES_OF:
        least, most = SIZES_OF[key]
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise CheckpointError(
                f"config.json: {shown(field)[1:-1]} must be an integer from {least} to {most}, got {shown(value)}"
            )
    elif type(value) is int and value > 1000:
        most = min((most for name, most in MOST if name.fullmatch(key)), default=value)
        if value > most:
            raise CheckpointError(f"config.json: {shown(field)[1:-1]} is {shown(value)}, the limit is {most}")
