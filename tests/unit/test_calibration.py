"""Calibration text of every kind becomes tokens, known by their hash."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchEncoding

from hf_quant.data import given as given_rows
from hf_quant.data.calibration import BUNDLED, calibration
from hf_quant.data.chat import Chat, may_hold_chats
from hf_quant.data.text import BUNDLED as HELD
from hf_quant.data.text import documents, paragraphs, read_text, record_texts, refuse_overlap
from hf_quant.errors import HfQuantError


class Bytes:
    """A tokenizer: one token a byte."""

    chat_template: str | None = None
    bos_token: str | None = None
    bos_token_id: int | None = None

    def __call__(self, text: str, **_: Any) -> Any:
        first = [] if self.bos_token_id is None else [self.bos_token_id]
        return type("Encoding", (), {"input_ids": first + list(text.encode())})

    def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
        return [bytes(row).decode(errors="replace") for row in ids]

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return (self.bos_token or "") + "".join(f"<{m['role']}>{m['content']}" for m in messages)


def test_the_bundled_text_is_not_the_one_measured_on() -> None:
    own, held = paragraphs(read_text(BUNDLED)), paragraphs(read_text(HELD))
    assert len(own) > 300 and not own & held
    made = calibration(None, Bytes(), 512, 65536, 256)
    assert made.ids.shape == (128, 512) and "bundled" in made.name
    assert BUNDLED.with_name("calibration.LICENSE.txt").is_file()


def test_identity() -> None:
    ids = torch.arange(64).view(2, 32)
    one, two = calibration(ids, None, 0, 0, 64), calibration(ids.int(), None, 0, 0, 64)
    assert one.sha256 == two.sha256 != calibration(ids.flip(0), None, 0, 0, 64).sha256
    assert set(one.to_dict()) == {"name", "sequences", "context", "sha256", "paragraphs"}


def test_files_and_lists(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello world " * 40)
    assert calibration(str(text), Bytes(), 32, 128, 256).ids.shape == (4, 32)
    assert calibration(["hello " * 20, "world " * 20], Bytes(), 32, 1000, 256).ids.shape == (7, 32)
    lines = tmp_path / "b.jsonl"
    messages = [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y" * 50}]
    lines.write_text(json.dumps({"text": "z" * 40}) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    plain, chat = Bytes(), Bytes()
    chat.chat_template = "yes"
    assert b"<user>" in bytes(calibration(lines, chat, 32, 1000, 256).ids.flatten().tolist())
    assert b"<user>" not in bytes(calibration(lines, plain, 32, 1000, 256).ids.flatten().tolist())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: "),
        ("[]", "neither text nor messages"),
        ('{"messages": []}', "neither text"),
        ('{"text": "a\\ud800b"}', "surrogates not allowed"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_lines_are_named(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(line + "\n")
    with pytest.raises(HfQuantError, match=rf"c.jsonl: line 1: .*{said.removeprefix('line 1: ')}"):
        calibration(tmp_path / "c.jsonl", Bytes(), 32, 1000, 256)


def test_refusals(tmp_path: Path) -> None:
    ids = torch.arange(64).view(2, 32)
    for source, vocabulary, said in (
        (ids, 60, "token id 63 in sequence 1 at 31 is outside of the vocabulary of 60"),
        (ids - 1, 64, "token id -1 in sequence 0 at 0"),
        (ids.float(), 64, "must be whole numbers"),
        (ids[0], 64, "must be whole numbers"),
        (ids[:1], 64, "1 sequence of"),
        ([], 64, "a list of strings that is not empty"),
        ("missing.txt", 64, "missing.txt: no such file"),
        (tmp_path / "nothing", 64, "no such file"),
    ):
        with pytest.raises(HfQuantError, match=said):
            calibration(source, Bytes(), 32, 64, vocabulary)
    with pytest.raises(HfQuantError, match="no tokenizer"):
        calibration(None, None, 32, 64, 64)
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(HfQuantError, match="not UTF-8 at byte 3"):
        calibration(tmp_path / "bad.txt", Bytes(), 2, 64, 256)


IDS = torch.arange(64).view(4, 16)


class Rows:
    """Like a data set of `datasets`: no sequence."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def __iter__(self) -> Any:
        return iter(self.rows)


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": IDS}, BatchEncoding({"input_ids": IDS.tolist()}), IDS.numpy(), IDS.tolist(), list(IDS),
        [row[None] for row in IDS], tuple(IDS.numpy()),
    ],
    ids=["mapping", "encoding", "array", "lists", "tensors", "batches", "arrays"],
)  # fmt: skip
def test_token_ids_in_every_form(given: Any) -> None:
    assert calibration(given, None, 0, 0, 64).sha256 == calibration(IDS, None, 0, 0, 64).sha256


@pytest.mark.parametrize(
    "given",
    [
        BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
        Rows([{"input_ids": row, "attention_mask": [1] * 16} for row in IDS.tolist()]),
        [{"input_ids": row[None], "attention_mask": torch.ones(1, 16, dtype=torch.int64)} for row in IDS],
    ],
    ids=["whole", "rows", "batches"],
)
def test_tokenized_rows_are_batches_of_one(given: Any) -> None:
    batches = calibration(given, None, 0, 0, 64).batches
    assert [batch["input_ids"].tolist() for batch in batches] == [[row] for row in IDS.tolist()]
    assert all(batch["attention_mask"].shape == (1, 16) for batch in batches)


def test_token_ids_of_different_lengths_are_batches() -> None:
    assert [batch["input_ids"].shape[1] for batch in calibration([[1, 2, 3], [4, 5]], None, 0, 0, 64).batches] == [
        3,
        2,
    ]


def test_rows_with_text_or_messages() -> None:
    chats = [[{"role": "user", "content": f"{i}" * 50}] for i in range(4)]
    texts = [chat[0]["content"] for chat in chats]
    for forms in (
        (texts, Rows([{"text": text} for text in texts]), {"text": texts}),
        (chats, Rows([{"messages": chat} for chat in chats]), {"messages": chats}),
    ):
        assert len({calibration(given, Bytes(), 32, 1000, 256).sha256 for given in forms}) == 1
    assert may_hold_chats(chats) and not may_hold_chats(["a text"]) and not may_hold_chats([{"input_ids": IDS}])


class Endless(IterableDataset[Any]):
    """As a data set that is streamed."""

    def __iter__(self) -> Any:
        return ({"text": f"document {i} of very many"} for i in itertools.count())


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: DataLoader(rows, batch_size=None)])
def test_what_never_ends_is_read_as_far_as_needed(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_rows, "MANY", 40)
    rows = list(itertools.islice(Endless(), 40))
    assert calibration(wrap(Endless()), Bytes(), 16, 64, 256).sha256 == calibration(rows, Bytes(), 16, 64, 256).sha256


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (5, "calibration: int is none of what is taken: a text or JSONL file"),
        ([object()], "row 0 is object, which is none of what is taken"),
        ({"a": [1, 2], "b": [1]}, "one value for each sample, and have {'a': 2, 'b': 1}"),
        ({"input_ids": IDS, "use_cache": True}, "'use_cache': None"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "1 batch is too little"),
        ([1, 2, 3], r"whole numbers \[S, T\]; a row has shape \[\]"),
        (IDS > 3, "whole numbers .*bool"),
        ([{"input_ids": IDS > 3}] * 2, "batch 0: input_ids must be whole numbers"),
        (["a text", 3], "row 1: neither text nor messages"),
        ({}, "a list of strings that is not empty"),
        ({"input_ids": []}, "a list of strings that is not empty"),
    ],
)
def test_what_is_no_calibration_data_is_told_what_is(given: Any, said: str) -> None:
    with pytest.raises(HfQuantError, match=said):
        calibration(given, Bytes(), 16, 64, 256)


def test_a_line_of_json_may_hold_what_unicode_calls_a_line_break(tmp_path: Path) -> None:
    texts = [f"one{mark}two and some more words" for mark in ("\u2028", "\u0085", "\x0b", "\x1e")]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    ids = calibration(tmp_path / "a.jsonl", Bytes(), 16, 1000, 256).ids
    assert "\u2028" in bytes(ids.flatten().tolist()).decode(errors="replace")


def test_a_chat_begins_with_one_first_token() -> None:
    messages = [{"role": "user", "content": "hello"}]
    tokenizer = Bytes()
    tokenizer.chat_template, tokenizer.bos_token, tokenizer.bos_token_id = "yes", "<s>", 1
    assert record_texts({"messages": messages}, Chat(tokenizer)) == ["<user>hello"], "the tokenizer adds it"
    tokenizer.bos_token_id = None
    assert record_texts({"messages": messages}, Chat(tokenizer)) == ["<s><user>hello"], "the template alone adds it"


def test_rows_of_a_dataset_are_texts_or_chats() -> None:
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you too"}]
    rows = ["one", chat, "", None, {"text": "two<|endoftext|>three"}]
    assert documents("set", rows, Chat(None)) == ["one\n", "hello\nyou too", "two\n", "three\n"]
    with pytest.raises(HfQuantError, match="dataset set: row 1: neither text nor messages"):
        documents("set", ["one", 2], Chat(None))
    with pytest.raises(HfQuantError, match="row 0: a message must have a content"):
        documents("set", [[{"role": "user", "content": None}]], Chat(None))


def test_an_overlap_is_seen_through_token_ids_and_line_endings() -> None:
    text = "\n\n".join(f"Paragraph {i} has so many words of its own that it is long enough, " * 4 for i in range(9))
    rows = torch.tensor(list(text.encode()))
    ids = rows[: len(rows) // 2 * 2].view(2, -1)
    with pytest.raises(HfQuantError, match="also occur in the calibration or training data"):
        refuse_overlap(text, calibration(ids, Bytes(), 0, 0, 256).paragraphs)
    with pytest.raises(HfQuantError, match="9 of 9 paragraphs"):
        refuse_overlap(text.replace("\n", "\r\n"), paragraphs(text))
    with pytest.raises(HfQuantError, match="also occur"):
        refuse_overlap(text, paragraphs(text.replace("\n\n", "\n")))


def test_no_tokens_at_all_is_refused() -> None:
    with pytest.raises(HfQuantError, match="at least 2 are needed, 32 tokens: --calibration-tokens 32"):
        calibration(["a text of more than two windows, all in all"], Bytes(), 16, 9, 256)
    with pytest.raises(HfQuantError, match="at least 2 are needed, 32 tokens: name a longer text"):
        calibration(["a text of twenty-one"], Bytes(), 16, 99, 256)
    with pytest.raises(HfQuantError, match="calibration_tokens must be a whole number from 1, got 0"):
        calibration(None, Bytes(), 512, 0, 256)


def test_token_ids_from_a_file(tmp_path: Path) -> None:
    ids = torch.arange(64).view(4, 16)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    data = calibration(str(tmp_path / "ids.safetensors"), None, 16, 64, 100)
    assert data.ids.equal(ids) and data.name == "ids.safetensors"
    assert data.sha256 == calibration(ids, None, 16, 64, 100).sha256
    save_file({"ids": ids, "mask": ids.clone()}, tmp_path / "two.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"no")
    for name, what in {"two": "holds 2 tensors", "no": "no.safetensors", "away": "no such file"}.items():
        with pytest.raises(HfQuantError, match=what):
            calibration(str(tmp_path / f"{name}.safetensors"), None, 16, 64, 100)
