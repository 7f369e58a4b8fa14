"""The vocabulary of a tokenizer.json as keys of a GGUF file, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_quant.errors import FormatError

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # expression by which text is split before merges, and llama.cpp's name of it
    _CASELESS + r"\p{N}{1,3}" + _SPACES: "llama-bpe",
    _CASELESS + r"\p{N}" + _SPACES: "qwen2",
}
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id", "unknown": "unk_token_id"}


def tokenizer_keys(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys below ``tokenizer.``; empty if the folder has no tokenizer.

    Args:
        folder: With tokenizer.json.
        config: config.json: the size of the vocabulary, and the numbers of special tokens.

    Raises:
        FormatError: It is of a kind that is not written here.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    model, added = stored["model"], {token["id"]: token for token in stored.get("added_tokens") or []}
    if model.get("type") != "BPE":
        raise FormatError(f"tokenizer.json: a model of type {model.get('type')}; GGUF is written with BPE")
    tokens = {number: text for text, number in model["vocab"].items()} | {
        n: token["content"] for n, token in added.items()
    }
    size = int(config["vocab_size"])
    if max(tokens, default=0) >= size:
        raise FormatError(f"tokenizer.json has a token {max(tokens)}, and vocab_size is {size}")
    keys = {
        "ggml.tokens": [tokens.get(number, f"[PAD{number}]") for number in range(size)],
        "ggml.token_type": [_type(number, tokens, added) for number in range(size)],
    }
    keys |= _sentencepiece(keys) if model.get("byte_fallback") else _byte_level(stored)
    keys |= _special(folder, config, stored)
    return {f"tokenizer.{key}": value for key, value in keys.items()}


def _type(number: int, tokens: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if number not in tokens:
        return UNUSED
    if number in added:
        return CONTROL if added[number].get("special") else USER_DEFINED
    text = tokens[number]
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _sentencepiece(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Merges in the order of the vocabulary, as SentencePiece writes them: an earlier token is a better one."""
    scores = [-float(number) for number in range(len(keys["ggml.tokens"]))]
    return {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": scores}


def _byte_level(stored: Mapping[str, Any]) -> dict[str, Any]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    return {"ggml.model": "gpt2", "ggml.pre": _split(stored.get("pre_tokenizer") or {}), "ggml.merges": merges}


def _split(before: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way text is split."""
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True) and not parts[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get((parts[0].get("pattern") or {}).get("Regex", ""))):
        return name
    raise FormatError(
        f"tokenizer.json: text is split by {' and '.join(map(str, kinds))} in a way that has no known name in llama.cpp; "
        f"known are those of GPT-2, {' and '.join(SPLITS.values())}"
    )


def _special(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, field in SPECIAL.items():
        value = config.get(field)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int:
            keys[f"ggml.{name}_token_id"] = value
    post = json.dumps(stored.get("post_processor") or {})
    bos = keys.get("ggml.bos_token_id")
    first = next((t["content"] for t in stored.get("added_tokens") or [] if t["id"] == bos), None)
    keys["ggml.add_bos_token"] = first is not None and json.dumps(first) in post
    template = folder / "chat_template.jinja"
    if template.is_file():
        keys["chat_template"] = template.read_text(encoding="utf-8")
    return keys


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `tokenizer_keys`, for byte-level vocabularies: file name to content.

    Raises:
        FormatError: The keys contradict each other.
    """
    tokens: Any = metadata.get("tokenizer.ggml.tokens")
    types: Any = metadata.get("tokenizer.ggml.token_type")
    merges: Any = metadata.get("tokenizer.ggml.merges", [])
    split: Any = metadata.get("tokenizer.ggml.pre")
    expressions = {name: text for text, name in SPLITS.items()} | {"gpt-2": ""}
    if metadata.get("tokenizer.ggml.model") != "gpt2" or split not in expressions:
        return {}
    if not (_strings(tokens) and _strings(merges) and isinstance(types, list) and len(types) == len(tokens)):
        raise FormatError("tokenizer.ggml: tokens, token_type and merges must be arrays, the first two of one length")
    if len(set(tokens)) != len(tokens):
        raise FormatError("tokenizer.ggml.tokens: a token stands twice")
    added = [
        {"id": n, "content": tokens[n], "special": types[n] == CONTROL, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for n in range(len(tokens)) if types[n] in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    # added tokens too: those outside of the vocabulary would be numbered from its end on, whatever their id says
    vocabulary = {text: n for n, text in enumerate(tokens) if types[n] != UNUSED}
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 or "".join(pair) not in vocabulary or not set(pair) <= vocabulary.keys() for pair in pairs):
        raise FormatError("tokenizer.ggml.merges: a merge is not of two tokens that make a third")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split == "gpt-2"}
    first = {"type": "Split", "pattern": {"Regex": expressions[split]}, "behavior": "Isolated", "invert": False}
    stored: dict[str, Any] = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "decoder": level | {"use_regex": True},
        "pre_tokenizer": level if split == "gpt-2" else {"type": "Sequence", "pretokenizers": [first, level]},
        "post_processor": None, "model": {"type": "BPE", "vocab": vocabulary, "merges": pairs},
    }  # fmt: skip
    special = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in SPECIAL}
    names = {f"{key[:3]}_token": tokens[n] for key, n in special.items() if type(n) is int and 0 <= n < len(tokens)}
    if metadata.get("tokenizer.ggml.add_bos_token") is True and "bos_token" in names:
        bos = {"SpecialToken": {"id": names["bos_token"], "type_id": 0}}
        one, two = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        stored["post_processor"] = {
            "type": "TemplateProcessing", "single": [bos, one], "pair": [bos, one, bos, two],
            "special_tokens": {names["bos_token"]: {"id": names["bos_token"], "ids": [special["bos"]], "tokens": [names["bos_token"]]}},
        }  # fmt: skip
    config = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"} | names
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer.json": stored,
        "tokenizer_config.json": config | ({"chat_template": template} if isinstance(template, str) else {}),
    }


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
