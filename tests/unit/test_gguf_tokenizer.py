"""The vocabulary of a tokenizer in a GGUF file, and back: the same tokens under the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hf_quant.gguf.tokenizer import tokenizer_json, tokenizer_keys

LETTERS = ["<end>", *"abcdefghij0123456789!Ġ", "<tool>", "ab"]  # added tokens first, and among the others


def byte_level() -> dict[str, Any]:
    """tokenizer.json with the words of GPT-2."""
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(LETTERS)}, [("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    stored: dict[str, Any] = json.loads(tokenizer.to_str())
    return stored


def keys_of(folder: Path, stored: dict[str, Any], **config: Any) -> dict[str, Any]:
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return tokenizer_keys(folder, {"vocab_size": 32, "eos_token_id": 0} | config)


def there_and_back(folder: Path, stored: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(keys_of(folder, stored))["tokenizer.json"]))


def test_every_token_keeps_its_number(tmp_path: Path) -> None:
    first = Tokenizer.from_str(json.dumps(byte_level()))
    second = there_and_back(tmp_path, byte_level())
    assert {token: second.token_to_id(token) for token in LETTERS} == first.get_vocab()
    assert first.encode("ab 1<tool>c<end>").ids == second.encode("ab 1<tool>c<end>").ids
