"""The vocabulary of a tokenizer.json as keys of a GGUF file, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_quant.disk.strict_json import parsed, shown
from hf_quant.errors import FormatError

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # expression by which text is split before merges, and llama.cpp's name of it
    _CASELESS + r"\p{N}{1,3}" + _SPACES: "llama-bpe",
    _CASELESS + r"\p{N}" + _SPACES: "qwen2",
}
WHOLE_WORDS = ("llama-bpe",)  # ways for which llama.cpp looks for a word in the vocabulary before it merges
MAX_VALUES = 8_000_000  # in tokenizer.json: half a million merges, and three times as many
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
NFC = {"type": "NFC"}  # of Qwen; llama.cpp leaves text as it is
PREPEND = {"type": "Prepend", "prepend": "▁"}
ISOLATED = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"add_prefix_space": True, "use_regex": True}  # of ByteLevel, where it says nothing
NORMALIZERS, PRE_TOKENIZERS = ("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id", "unknown": "unk_token_id"}


def tokenizer_keys(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys below ``tokenizer.``; empty if the folder has no tokenizer.json.

    Args:
        folder: With tokenizer.json.
        config: config.json: the size of the vocabulary, and the numbers of special tokens.

    Raises:
        FormatError: It is of a kind that is not written here.
        CheckpointError: A file is damaged; the message names it.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    stored = _read(path)
    model, added = _model(stored), {token["id"]: token for token in _added(stored)}
    tokens = {number: text for text, number in model["vocab"].items()} | {
        n: token["content"] for n, token in added.items()
    }
    size = int(config["vocab_size"])
    if max(tokens, default=0) >= size:
        raise FormatError(f"tokenizer.json has a token {max(tokens)}, and vocab_size is {size}")
    keys: dict[str, Any] = {
        "ggml.tokens": [tokens.get(number, f"[PAD{number}]") for number in range(size)],
        "ggml.token_type": [_type(number, tokens, added) for number in range(size)],
    }
    prefix = _space_before(stored) if model.get("byte_fallback") else None
    keys |= _byte_level(stored, model) if prefix is None else _sentencepiece(model, size, prefix)
    keys |= _special(config, stored, size)
    if (template := _template(folder)) is not None:
        keys["chat_template"] = template
    return {f"tokenizer.{key}": value for key, value in keys.items()}


def _read(path: Path) -> dict[str, Any]:
    return parsed(path.read_bytes(), path.name, values=MAX_VALUES)


def _model(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The part of tokenizer.json that makes tokens of words, with merges as pairs."""
    model = stored.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise FormatError(f"tokenizer.json: a model of type {shown(kind)}; GGUF is written with BPE")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not all(type(number) is int and number >= 0 for number in vocab.values()):
        raise FormatError("tokenizer.json: model.vocab must have a number for every token")
    pairs: list[Any] = [m.split(" ") if isinstance(m, str) else m for m in merges] if isinstance(merges, list) else [0]
    if not all(_strings(pair) and len(pair) == 2 for pair in pairs):
        raise FormatError("tokenizer.json: model.merges must be pairs of tokens")
    return model | {"merges": pairs}


def _added(stored: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Tokens besides those of the model."""
    added = stored.get("added_tokens") or []
    fits = isinstance(added, list) and all(
        isinstance(t, dict) and type(t.get("id")) is int and isinstance(t.get("content"), str) for t in added
    )
    if not fits:
        raise FormatError("tokenizer.json: added_tokens must have an id and a content")
    return list(added)


def _type(number: int, tokens: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if number not in tokens:
        return UNUSED
    if number in added:
        return CONTROL if added[number].get("special") else USER_DEFINED
    text = tokens[number]
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _space_before(stored: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before a text, as by SentencePiece, which makes "▁" of spaces; None for other kinds."""
    steps, (before, *others) = (_steps(stored, *names) for names in (NORMALIZERS, PRE_TOKENIZERS))
    if before == {} and steps[-1] == REPLACE and steps[:-1] in ([], [PREPEND]):
        return len(steps) == 2
    if steps == [{}] and not others and (before.get("type"), before.get("replacement")) == ("Metaspace", "▁"):
        return None if before.get("split", True) else before.get("prepend_scheme", "always") != "never"
    return None


def _steps(stored: Mapping[str, Any], field: str, inner: str) -> list[dict[str, Any]]:
    """The steps that a field of tokenizer.json is made of; one that is empty for a field without a value."""
    value = stored.get(field) or {}
    steps = value.get(inner, [value]) if isinstance(value, dict) else None
    if isinstance(steps, list) and steps and all(isinstance(step, dict) for step in steps):
        return steps
    raise FormatError(f"tokenizer.json: {field} must be one step or a sequence of them, got {shown(value)}")


def _sentencepiece(model: Mapping[str, Any], size: int, prefix: bool) -> dict[str, Any]:
    """Merges in the order of the vocabulary, as SentencePiece writes them: an earlier token is a better one."""
    results = [model["vocab"].get("".join(pair), -1) for pair in model["merges"]]
    if results != sorted(results):
        raise FormatError(
            "tokenizer.json: its merges make tokens in another order than that of their numbers, and a file of GGUF with "
            "SentencePiece knows no other"
        )
    scores = [-float(number) for number in range(size)]
    return {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": scores, "ggml.add_space_prefix": prefix}


def _byte_level(stored: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    split = _split(_steps(stored, *PRE_TOKENIZERS))
    if _steps(stored, *NORMALIZERS) not in ([{}], [NFC]):
        raise FormatError(f"tokenizer.json: llama.cpp has no normalizer {shown(stored['normalizer'])}")
    if bool(model.get("ignore_merges")) != (split in WHOLE_WORDS):
        how = "takes" if split in WHOLE_WORDS else "does not take"
        raise FormatError(
            f"tokenizer.json: ignore_merges is {shown(model.get('ignore_merges'))}, and llama.cpp {how} words of the "
            f"vocabulary whole where text is split as by {split}"
        )
    return {"ggml.model": "gpt2", "ggml.pre": split, "ggml.merges": [" ".join(pair) for pair in model["merges"]]}


def _split(steps: list[dict[str, Any]]) -> str:
    """llama.cpp's name for the way text is split."""
    *before, last = [ISOLATED | step for step in steps[:-1]] + [BYTES | steps[-1]]
    kinds = [step.get("type") for step in (*before, last)]
    if kinds[-1] == "ByteLevel" and not last["add_prefix_space"] and last["use_regex"] == (not before):
        ways: dict[str, Any] = {"gpt-2": []} | {
            name: [ISOLATED | {"pattern": {"Regex": text}}] for text, name in SPLITS.items()
        }
        if name := next((name for name, way in ways.items() if way == before), None):
            return name
    raise FormatError(
        f"tokenizer.json: text is split by {' and '.join(map(str, kinds))} in a way that has no known name in llama.cpp; "
        f"known are those of GPT-2, {' and '.join(SPLITS.values())}"
    )


def _special(config: Mapping[str, Any], stored: Mapping[str, Any], size: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, field in SPECIAL.items():
        value = config.get(field)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and 0 <= value < size:  # some models name a token of -1, which is none
            keys[f"ggml.{name}_token_id"] = value
    post = json.dumps(stored.get("post_processor") or {})
    bos = keys.get("ggml.bos_token_id")
    first = next((t["content"] for t in _added(stored) if t["id"] == bos), None)
    keys["ggml.add_bos_token"] = first is not None and json.dumps(first) in post
    return keys


def _template(folder: Path) -> str | None:
    """The chat template, which older tokenizers have in their tokenizer_config.json, perhaps among others."""
    path, config = folder / "chat_template.jinja", folder / CONFIG
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `tokenizer_keys`, for byte-level vocabularies: file name to content; empty for others.

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
    first = ISOLATED | {"pattern": {"Regex": expressions[split]}}
    stored: dict[str, Any] = {
        "version": "1.0", "added_tokens": added, "normalizer": NFC if split == "qwen2" else None,
        "decoder": level | {"use_regex": True},
        "pre_tokenizer": level if split == "gpt-2" else {"type": "Sequence", "pretokenizers": [first, level]},
        "post_processor": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": pairs, "ignore_merges": split in WHOLE_WORDS},
    }  # fmt: skip
    special = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in SPECIAL}
    names = {f"{key[:3]}_token": tokens[n] for key, n in special.items() if type(n) is int and 0 <= n < len(tokens)}
    if metadata.get("tokenizer.ggml.add_bos_token", split in WHOLE_WORDS) is True and "bos_token" in names:
        bos = {"SpecialToken": {"id": names["bos_token"], "type_id": 0}}
        one, two = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        stored["post_processor"] = {
            "type": "TemplateProcessing", "single": [bos, one], "pair": [bos, one, bos, two],
            "special_tokens": {names["bos_token"]: {"id": names["bos_token"], "ids": [special["bos"]], "tokens": [names["bos_token"]]}},
        }  # fmt: skip
    config = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"} | names
    template = metadata.get("tokenizer.chat_template")
    return {
        FILE: stored,
        CONFIG: config | ({"chat_template": template} if isinstance(template, str) else {}),
    }


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
