"""The vocabulary of a tokenizer in a GGUF file, and back: the same tokens under the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hf_quant.errors import CheckpointError, FormatError
from hf_quant.gguf.tokenizer import PREPEND, REPLACE, SPLITS, tokenizer_json, tokenizer_keys

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


def split_by(name: str, **model: Any) -> dict[str, Any]:
    """The same with the words of another model."""
    stored = byte_level()
    expression = next(text for text, known in SPLITS.items() if known == name)
    first = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    before = {"type": "Sequence", "pretokenizers": [first, last]}
    return stored | {"pre_tokenizer": before, "model": stored["model"] | model}


def test_words_of_the_vocabulary_stay_whole_where_llama_cpp_leaves_them(tmp_path: Path) -> None:
    """A token that no merge makes, in the vocabulary of Llama 3."""
    stored = split_by("llama-bpe", ignore_merges=True)
    stored["model"]["vocab"] |= {"cdcd": len(LETTERS)}
    assert there_and_back(tmp_path, stored).encode("cdcd").ids == [len(LETTERS)]
    for wrong, kept in ((split_by("llama-bpe"), "takes"), (split_by("qwen2", ignore_merges=True), "does not take")):
        with pytest.raises(FormatError, match=rf"ignore_merges.*llama.cpp {kept} words"):
            keys_of(tmp_path, wrong)


def test_what_files_leave_unsaid(tmp_path: Path) -> None:
    """Llama 3 begins with a token; Qwen brings letters and their accents together."""
    keys = keys_of(tmp_path, split_by("llama-bpe", ignore_merges=True), bos_token_id=0)
    assert tokenizer_json(keys)["tokenizer.json"]["post_processor"] is None
    del keys["tokenizer.ggml.add_bos_token"]
    assert tokenizer_json(keys)["tokenizer.json"]["post_processor"]["type"] == "TemplateProcessing"
    assert tokenizer_json(keys)["tokenizer.json"]["normalizer"] is None
    keys = keys_of(tmp_path, split_by("qwen2") | {"normalizer": {"type": "NFC"}})
    assert tokenizer_json(keys)["tokenizer.json"]["normalizer"] == {"type": "NFC"}


SPACES = {
    "before each text": ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None, True),
    "as they are": (REPLACE, None, False),
    "before, of Metaspace": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}, True),
    "not, of Metaspace": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", SPACES)
def test_sentencepiece_is_known_by_its_spaces(case: str, tmp_path: Path) -> None:
    normalizer, before, prefix = SPACES[case]
    stored = byte_level() | {"normalizer": normalizer, "pre_tokenizer": before}
    stored["model"] |= {"byte_fallback": True}
    keys = keys_of(tmp_path, stored)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"] is prefix
    assert tokenizer_json(keys) == {}
    stored["model"] |= {"merges": [["a", "b"], ["a", "a"]], "vocab": stored["model"]["vocab"] | {"aa": 1}}
    with pytest.raises(FormatError, match="another order"):
        keys_of(tmp_path, stored)


def test_bytes_to_fall_back_on_do_not_make_sentencepiece(tmp_path: Path) -> None:
    stored = byte_level()
    stored["model"]["byte_fallback"] = True
    assert keys_of(tmp_path, stored)["tokenizer.ggml.model"] == "gpt2"


def before_with(**options: Any) -> dict[str, Any]:
    stored = split_by("qwen2")
    stored["pre_tokenizer"]["pretokenizers"][-1] |= options
    return stored


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({}, "type None"),
    "no vocabulary": ({"model": {"type": "BPE"}}, "vocab"),
    "merges of three": ({"model": {"type": "BPE", "vocab": {}, "merges": ["a b c"]}}, "pairs"),
    "an added token without a number": (byte_level() | {"added_tokens": [{"content": "x"}]}, "added_tokens"),
    "steps that are none": (byte_level() | {"pre_tokenizer": {"pretokenizers": []}}, "pre_tokenizer"),
    "small letters": (byte_level() | {"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    "words split twice": (before_with(use_regex=True), "no known name"),
    "a space before": (before_with(add_prefix_space=True), "no known name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_written_is_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=WRONG[case][1]):
        keys_of(tmp_path, WRONG[case][0])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*not valid JSON"):
        tokenizer_keys(tmp_path, {"vocab_size": 32})


def test_numbers_that_are_no_tokens_are_left_out(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, byte_level(), pad_token_id=-1, bos_token_id=99)
    assert [name for name in keys if name.endswith("token_id")] == ["tokenizer.ggml.eos_token_id"]


def test_chat_templates_of_older_tokenizers(tmp_path: Path) -> None:
    for template in ("{{ x }}", [{"name": "tool_use", "template": "-"}, {"name": "default", "template": "{{ x }}"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert keys_of(tmp_path, byte_level())["tokenizer.chat_template"] == "{{ x }}"
    (tmp_path / "chat_template.jinja").write_text("{{ newer }}")
    assert keys_of(tmp_path, byte_level())["tokenizer.chat_template"] == "{{ newer }}"
