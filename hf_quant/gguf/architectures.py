"""Architectures that GGUF files and checkpoints of transformers both have: names of tensors, fields of config.json, order of rows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import FormatError

_OUTSIDE = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip
_INSIDE = {  # of a block
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GGUF_NAMES = {name: other for other, name in (_OUTSIDE | _INSIDE).items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", re.ASCII)
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)", re.ASCII)
ROPE = "rope_freqs.weight"  # divisors of the frequencies, from the scaling of rotary embeddings


@dataclass(frozen=True)
class Architecture:
    """An architecture.

    Attributes:
        name: In GGUF.
        model_type: In config.json.
        class_name: The class of its language model in transformers.
        pairs: Whether llama.cpp rotates neighbouring rows of a head together, and transformers the two halves of it.
        vocab_size: Whether the size of the vocabulary is a key of its own.
    """

    name: str
    model_type: str
    class_name: str
    pairs: bool = False
    vocab_size: bool = False


ARCHITECTURES = (
    Architecture("llama", "llama", "LlamaForCausalLM", pairs=True, vocab_size=True),
    Architecture("llama", "mistral", "MistralForCausalLM", pairs=True, vocab_size=True),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM"),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM"),
)
NUMBERS: tuple[tuple[str, str, type], ...] = (  # key below the architecture's name, field of config.json, type
    ("context_length", "max_position_embeddings", int),
    ("embedding_length", "hidden_size", int),
    ("feed_forward_length", "intermediate_size", int),
    ("block_count", "num_hidden_layers", int),
    ("attention.head_count", "num_attention_heads", int),
    ("attention.head_count_kv", "num_key_value_heads", int),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
    ("attention.key_length", "head_dim", int),
    ("attention.value_length", "head_dim", int),
    ("rope.dimension_count", "head_dim", int),
    ("rope.freq_base", "rope_theta", float),
)

SCALED: dict[
    str, dict[str, tuple[str, type]]
] = {  # kind of rotary embeddings to key below rope.scaling, field and type
    "linear": {"factor": ("factor", float)},
    "yarn": {"factor": ("factor", float), "original_context_length": ("original_max_position_embeddings", int)},
}
ROPE_TYPES = ("default", "llama3", *SCALED)
USUAL = {  # fields of rope_parameters that llama.cpp has no key for, and the value that it computes with
    "partial_rotary_factor": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None, "beta_fast": 32, "beta_slow": 1,
    "truncate": True,
}  # fmt: skip
NEUTRAL = {
    "attn_factor": 1,
    "alpha": 0,
    "yarn_log_multiplier": 0,
    "yarn_attn_factor": 1,
    "yarn_beta_fast": 32,
    "yarn_beta_slow": 1,
}


def of_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json.

    Raises:
        FormatError: None is known here for it.
    """
    kind = config.get("model_type")
    for architecture in ARCHITECTURES:
        if architecture.model_type == kind:
            break
    else:
        raise FormatError(
            f"model_type {ascii(kind)[:60]}: GGUF is written for {', '.join(a.model_type for a in ARCHITECTURES)}; "
            "for others, --to dense and llama.cpp's convert_hf_to_gguf.py"
        )
    if config.get("sliding_window") and config.get("use_sliding_window", kind == "mistral"):
        raise FormatError(f"sliding_window {config['sliding_window']}: files of {architecture.name} know none")
    if config.get("mlp_bias") or config.get("hidden_act", "silu") != "silu":
        raise FormatError(f"mlp_bias or hidden_act of config.json: files of {architecture.name} have none but silu")
    return architecture


def of_file(metadata: Mapping[str, Any]) -> Architecture:
    """The architecture of a file.

    Raises:
        FormatError: It is not one of those that are known here.
    """
    name = metadata.get("general.architecture")
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = dict.fromkeys(a.name for a in ARCHITECTURES)
    raise FormatError(
        f"general.architecture {ascii(name)[:60]}: files of {', '.join(known)} are read; transformers reads others"
    )


def gguf_name(name: str) -> str:
    """Name of a tensor in GGUF for one of a checkpoint.

    Raises:
        FormatError: GGUF has no such tensor.
    """
    if (match := _LAYER.fullmatch(name)) and match[2] in _GGUF_NAMES:
        return f"blk.{match[1]}.{_GGUF_NAMES[match[2]]}.{match[3]}"
    stem, _, leaf = name.rpartition(".")
    if stem in _OUTSIDE.values():
        return f"{_GGUF_NAMES[stem]}.{leaf}"
    raise FormatError(f"tensor {name}: files of GGUF have no place for it")


def model_name(name: str) -> str:
    """Inverse of `gguf_name`."""
    if (match := _BLOCK.fullmatch(name)) and match[2] in _INSIDE:
        return f"model.layers.{match[1]}.{_INSIDE[match[2]]}.{match[3]}"
    stem, _, leaf = name.rpartition(".")
    if stem in _OUTSIDE and leaf == "weight":
        return f"{_OUTSIDE[stem]}.{leaf}"
    raise FormatError(f"tensor {name[:80]}: no model here has one of that name")


def row_order(name: str, architecture: Architecture, config: Mapping[str, Any], rows: int) -> Tensor | None:
    """int64 ``[rows]``: which row of a checkpoint each row of GGUF is, for a tensor of that name in GGUF; None for the same order."""
    if not architecture.pairs or not re.search(r"\.attn_[qk]\.(weight|bias)$", name):
        return None
    heads = config["num_attention_heads"] if ".attn_q." in name else config["num_key_value_heads"]
    if rows % (2 * heads):
        raise FormatError(f"tensor {name}: {rows} rows for {heads} heads")
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _rope(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """How the rotary embeddings of a config.json are scaled, and the kind of it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise FormatError(f"rope_type {kind}: GGUF is written with {', '.join(ROPE_TYPES)}")
    for field, usual in USUAL.items():
        if rope.get(field) not in (None, usual):
            raise FormatError(f"rope_parameters.{field} {rope[field]}: files of GGUF have no place for it")
    return rope, kind


def rope_divisors(config: Mapping[str, Any]) -> Tensor | None:
    """float32 ``[head_dim / 2]``: what frequencies are divided by; None if all by one.

    Raises:
        FormatError: The rotary embeddings are scaled in a way that is not known here.
    """
    rope, kind = _rope(config)
    if kind != "llama3":
        return None
    dim, theta = head_dim(config), theta_of(config)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    length = rope["original_max_position_embeddings"]
    divisors = []
    for frequency in (theta ** (-2 * i / dim) for i in range(dim // 2)):
        wave = 2 * math.pi / frequency
        smooth = (length / wave - low) / (high - low)
        divisors.append(
            1.0 if wave < length / high else factor if wave > length / low else 1 / ((1 - smooth) / factor + smooth)
        )
    return torch.tensor(divisors, dtype=torch.float32)


def head_dim(config: Mapping[str, Any]) -> int:
    """Columns of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def theta_of(config: Mapping[str, Any]) -> float:
    """The base of rotary frequencies."""
    rope = config.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def metadata_of(config: Mapping[str, Any], architecture: Architecture) -> dict[str, int | float | str]:
    """The keys of a file for a config.json, with the values that transformers gives to fields that it does not have.

    Raises:
        FormatError: The rotary embeddings are scaled in a way that is not known here.
    """
    filled = dict(config) | {"head_dim": head_dim(config), "rope_theta": theta_of(config)}
    keys: dict[str, int | float | str] = {key: kind(filled[field]) for key, field, kind in NUMBERS}
    if architecture.vocab_size:
        keys["vocab_size"] = int(config["vocab_size"])
    rope, kind = _rope(config)
    if kind in SCALED:
        keys |= {"rope.scaling.type": kind} | {
            f"rope.scaling.{key}": cast(rope[field]) for key, (field, cast) in SCALED[kind].items()
        }
    return {f"{architecture.name}.{key}": value for key, value in keys.items()}


def scaling_of(metadata: Mapping[str, Any], name: str, length: int) -> dict[str, Any]:
    """How the rotary embeddings of a file are scaled, as fields of ``rope_parameters``; empty if they are not.

    As llama.cpp reads it: linear where the type is not named, the whole context where the original one is not.

    Args:
        metadata: Of the file.
        name: Of its architecture.
        length: Of its context.

    Raises:
        FormatError: They are scaled in a way that is not known here; the message names the key.
    """
    kind, keys = metadata.get(f"{name}.rope.scaling.type", "linear"), f"{name}.rope.scaling."
    if kind not in ("none", *SCALED):
        raise FormatError(f"key {keys}type: {ascii(kind)[:60]}: none, {' and '.join(SCALED)} are read")
    for key, neutral in NEUTRAL.items():
        if metadata.get(keys + key, neutral) != neutral:
            raise FormatError(f"key {keys}{key}: {ascii(metadata[keys + key])[:60]}: transformers has no such factor")
    older = _number(metadata, f"{name}.rope.scale_linear", float, {})
    factor = _number(metadata, f"{keys}factor", float, {}) or older or 1.0
    if kind == "none" or factor == 1:
        return {}
    original = _number(metadata, f"{keys}original_context_length", int, {}) or length
    more = {"original_max_position_embeddings": original} if kind == "yarn" else {}
    return {"rope_type": kind, "factor": factor} | more


def config_of(
    metadata: Mapping[str, Any], architecture: Architecture, vocabulary: int, *, tied: bool, bias: bool
) -> dict[str, Any]:
    """config.json for the keys of a file.

    Args:
        metadata: Of the file.
        architecture: Of the file.
        vocabulary: Rows of its embeddings.
        tied: Whether it has no output head.
        bias: Whether its attention has biases.

    Raises:
        FormatError: A key is missing or has a value of another type; the message names it.
    """
    config: dict[str, Any] = {}
    for key, field, kind in NUMBERS:
        value = _number(metadata, f"{architecture.name}.{key}", kind, config)
        if value is not None and config.setdefault(field, value) != value:
            raise FormatError(f"{architecture.name}.{key}: {value}, and {config[field]} elsewhere")
    theta = config.pop("rope_theta", 10000.0)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // max(1, config["num_attention_heads"]))
    scaling = scaling_of(metadata, architecture.name, config["max_position_embeddings"])
    return {
        "architectures": [architecture.class_name], "model_type": architecture.model_type, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "hidden_act": "silu", "attention_bias": bias,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"} | scaling,
    } | config  # fmt: skip


_OPTIONAL = (
    "head_count_kv",
    "key_length",
    "value_length",
    "dimension_count",
    "freq_base",
    "scaling.factor",
    "scale_linear",
    "original_context_length",
)


def _number(metadata: Mapping[str, Any], key: str, kind: type, config: Mapping[str, Any]) -> Any:
    value: Any = metadata.get(key)
    if value is None and key.endswith(_OPTIONAL):
        return None
    if type(value) not in (int, kind) or not 0 < value < 1 << 31:
        raise FormatError(
            f"key {key}: {ascii(value)[:60]}, expected {'a whole number' if kind is int else 'a number'} above zero"
        )
    return kind(value)
