"""Calibration text of every kind becomes tokens, known by their hash."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant.calibration import BUNDLED, calibration
from hf_quant.errors import HfQuantError
from hf_quant.text import BUNDLED as HELD
from hf_quant.text import paragraphs, read_text


class Bytes:
    """A tokenizer: one token a byte."""

    chat_template: str | None = None

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": list(text.encode())})

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


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
    ("line", "said"), [("{", "line 1: "), ("[]", "neither text nor messages"), ('{"messages": []}', "neither text")]
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
