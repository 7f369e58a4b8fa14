"""Secrets planted in every kind of file, in every encoding: none is published, with detect-secrets or without."""

from __future__ import annotations

import base64
import html
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

from hf_quant.errors import PushError
from hf_quant.publish import file_kinds, secrets
from hf_quant.publish.scan import look_through, snapshot

from .conftest import REPO

IN_USE = "hf_" + "q" * 10 + "TokenInUse" + "7" * 14
SECRETS = {  # kind: one that nobody has
    "Hugging Face": "hf_" + "aB3dE6gH9j" * 3 + "KlMn",
    "Hugging Face organization": "api_org_" + "aB3dE6gH9j" * 3 + "KlMn",
    "OpenAI": "sk-proj-" + "abcdefghijklmnopqrstuvwx",
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "GitHub": "ghp_" + "a1B2" * 9,
    "GitHub, fine-grained": "github_pat_" + "11ABCDEFG0" * 3,
    "GitLab": "glpat-" + "a1B2c3D4e5F6g7H8i9J0",
    "Google": "AIza" + "b7C" * 11 + "d9",
    "Slack": "xoxb-" + "123456789012-abcdefABCDEF",
    "npm": "npm_" + "a1B2" * 9,
    "PyPI": "pypi-" + "AgEIcHlwaS5vcmc" + "a1b2c3d4" * 9,
    "Stripe": "sk_" + "live_" + "a1B2c3D4e5F6g7H8i9J0k1L2",
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9"
    + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0."
    + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP",
    "private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "password in an address": "https://user:" + "hunter2hunter2@pypi.corp.example/simple",
    "password by name": "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
    "login": "machine huggingface.co login me " + "password hunter2hunter2",
    "home directory": "/home/" + "somebody/models",
    "home directory, Windows": "c:\\users\\" + "somebody\\models",
    "token in use": IN_USE,
}
ENCODINGS: dict[str, Callable[[str], str]] = {
    "alone": lambda s: s,
    "after a newline": lambda s: f"deploy token:\n{s}\n",
    "after a tab": lambda s: f"a\t{s}",
    "after a carriage return": lambda s: f"a\r{s}",
    "after a letter that JSON escapes": lambda s: f"\u00e9 \u00e9{s}" if s[0].isalpha() else f"\u00e9 {s}",
    "after an underscore": lambda s: f"my_{s}" if s[0].isalpha() and ":\\" not in s else f"my {s}",
    "escaped twice": lambda s: json.dumps({"a": json.dumps({"b": f"x\n{s}"})}),
    "all in escapes": lambda s: "".join(f"\\u{ord(c):04x}" for c in s),
    "base64": lambda s: base64.b64encode(f"me:{s}".encode()).decode(),
    "quoted for an address": lambda s: f"https://x.example/?t={quote(s, safe='')}",
    "HTML": lambda s: "".join(f"&#{ord(c)};" for c in html.escape(s)),
    "with invisible letters": lambda s: "\u200b".join(s),
    "full width": lambda s: "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in s),
}


def safetensors(text: str) -> bytes:
    header = json.dumps({"__metadata__": {"note": text}}).encode()
    return struct.pack("<Q", len(header)) + header


def png(text: str) -> bytes:
    chunk = b"Comment\0" + text.encode()
    return file_kinds._PNG[0] + struct.pack(">I", len(chunk)) + b"tEXt" + chunk + bytes(4) + file_kinds._PNG[1]


FILES: dict[str, Callable[[str], bytes]] = {
    "config.json": lambda s: json.dumps({"note": s}).encode(),
    "generation_config.json": lambda s: json.dumps({s: 1}).encode(),
    "sub/special.json": lambda s: json.dumps([[{"a": [s]}]], ensure_ascii=False, indent=1).encode(),
    "tokenizer_config.json": lambda s: json.dumps({"chat_template": "{# " + s + " #}{{ messages }}"}).encode(),
    "tokenizer.json": lambda s: json.dumps({"model": {"vocab": {s: 1, "a": 2}}}).encode(),
    "few.jsonl": lambda s: (json.dumps({"a": 1}) + "\n" + json.dumps({"text": s}) + "\n").encode(),
    "chat_template.jinja": lambda s: b"{# " + s.encode() + b" #}",
    "NOTES.md": lambda s: ("---\n" + yaml.safe_dump({"x": s}, width=40) + "---\n# notes\n").encode(),
    "NOTICE": lambda s: b"Keep this: " + s.encode(),
    "notes.txt": lambda s: b"see\n" + s.encode() + b"\n",
    "settings.yaml": lambda s: yaml.safe_dump({"a": {"b": [s]}}, width=30).encode(),
    "spiece.model": lambda s: b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02 \xff" + s.encode(),
    "model.safetensors": safetensors,
    "assets/ladder.png": png,
}
CASES = list(itertools.product(SECRETS, ENCODINGS, FILES))


def planted(folder: Path, name: str, data: bytes) -> str | None:
    """What is said of the folder with nothing but this file."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    try:
        look_through(snapshot(folder), [IN_USE])
        return None
    except PushError as error:
        return str(error)
    finally:
        path.unlink()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without detect-secrets: the patterns of this package hold by themselves."""
    monkeypatch.setattr(secrets, "_detectors", lambda: ())


def test_no_secret_is_published(alone: None, tmp_path: Path) -> None:
    """Every kind in every encoding in every kind of file."""
    passed = []
    for secret, encoding, name in CASES:
        data = FILES[name](ENCODINGS[encoding](SECRETS[secret]))
        said = planted(tmp_path, name, data)
        if said is None:
            passed.append((secret, encoding, name))
        else:
            assert name in said and SECRETS[secret] not in said
    assert len(CASES) >= 60 and passed == []


def test_detect_secrets_knows_more(tmp_path: Path) -> None:
    pytest.importorskip("detect_secrets")
    key = b"sq0csp-" + b"a1B2c3D4e5" * 4 + b"xyz"
    assert "NOTICE: holds what looks like a secret (Square OAuth Secret)" in str(planted(tmp_path, "NOTICE", key))
    assert secrets.library() is None


def test_without_detect_secrets(alone: None) -> None:
    assert "hf-quant[publish]" in str(secrets.library())


def test_what_looks_like_one_and_is_none(tmp_path: Path) -> None:
    """Words of vocabularies and prose, placeholders, digests, and the texts of this repository."""
    harmless = [
        "task-specific-fine-tuning-of-models", "hf_quant", "self_attention_output_projection", "sk-learn", "<|eos_token|>",
        "api_key=YOUR_API_KEY_GOES_HERE", "eos_token: <|end_of_text|>", "0" * 40, "da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "https://example.org/home/terms", "https://example.org:8080/a@b", "ASIA AKIA MAKIAVELLI", "\\alpha \\\\ \\beta",
        "Copyright (c) 2026 Somebody <somebody@example.org>", "{{ raise_exception('roles must alternate') }}",
        base64.b64encode(bytes(range(256)) * 20).decode(),
    ]  # fmt: skip
    for name, wrap in FILES.items():
        assert planted(tmp_path, name, wrap("\n".join(harmless))) is None, name
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shipped = REPO / "examples" / "ref-llama-16m" / name
        if shipped.is_file():
            assert planted(tmp_path, name, shipped.read_bytes()) is None, name


@pytest.mark.parametrize("name", ["_name_or_path", "path"])
@pytest.mark.parametrize(
    "path", ["/mnt/data/somebody/model", "~somebody/model", "\\\\server\\somebody$\\m", "D:\\work\\m"]
)
def test_paths_of_some_machine(tmp_path: Path, name: str, path: str) -> None:
    assert "config.json: holds a path of some machine" in str(
        planted(tmp_path, "config.json", json.dumps({name: path}).encode())
    )


PICKLE_0 = b"cos\nsystem\n(S'id'\ntR."
REFUSED = {
    "modeling.py": b"import os", "modeling.pyw": b"import os", "x.js": b"x", "page.html": b"<script>", "x.svg": b"<svg/>",
    "x.jar": b"PK\x05\x06", "x.zip": b"PK\x05\x06", "x.wasm": b"\0asm", "x.tar": b"x", "x.gz": b"\x1f\x8b", "x.onnx_data": b"",
    "x.command": b"x", "x.lnk": b"x", "x.rb": b"x", "x.bin": b"x", "x.pth.tar": b"x", "x": b"x", "LICENSE.env": b"x",
    "LICENSE.py": b"x", "license.bin": b"\x80\x04x", "notice.html": b"x", "NOTICE.safetensors": b"junk", "picture.png": b"x",
    "x.json": b' #!/bin/sh', "y.json": PICKLE_0, "z.json": b"{", "x.txt": b"\xef\xbb\xbf#!/bin/sh", "y.txt": PICKLE_0,
    "z.txt": b"]q\x00cos\nsystem", "utf16.txt": "hello".encode("utf-16"), "a.txt": b"\x1f\x8b", "b.txt": b"a\x1b[31mb",
    "LICENSE": b"MZ", "COPYING": b"\x80\x02", "x.yaml": b"!!python/object/apply:os.system [id]", "x.md": b"---\na: !!python/name:os\n---\n",
    "assets/x.png": b"\x89PNG\r\n\x1a\nno end", "assets/x.jpg": b"x", "spiece.model": b"\x80\x04x", "few.jsonl": b"{\n",
    "x.yml": b"a: [", "latin.txt": "é".encode("latin-1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_kinds_that_are_refused(tmp_path: Path, name: str) -> None:
    try:
        said = planted(tmp_path, name, REFUSED[name])
    except Exception as error:  # a damaged safetensors file has an error of its own
        said = str(error)
    assert said is not None and name in said


def test_a_file_that_changes_after_it_was_looked_through(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "model.safetensors").write_bytes(safetensors("x"))
    before = snapshot(tmp_path)
    before.check_unchanged()
    assert before.plus({"a.txt": b"b"}).held["a.txt"] == b"b" and before.held["a.txt"] == b"a"
    (tmp_path / "a.txt").write_text("b")
    with pytest.raises(PushError, match=r"a\.txt was changed while it was being published"):
        before.check_unchanged()
    before.check_unchanged(written=["a.txt"])
    (tmp_path / "model.safetensors").write_bytes(safetensors("y"))
    with pytest.raises(PushError, match=r"model\.safetensors was changed"):
        before.check_unchanged(written=["a.txt"])
