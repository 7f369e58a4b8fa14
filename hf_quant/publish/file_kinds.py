"""The kinds of files that can be published: those that need no trust. Every other kind is refused."""

from __future__ import annotations

import json
import pickletools
import re
from pathlib import PurePosixPath

LARGEST = 200_000_000  # bytes of a file other than weights, which is read completely
WEIGHTS = ".safetensors"
TEXT = {".json", ".jsonl", ".md", ".txt", ".jinja", ".yaml", ".yml", ".tiktoken", ".bpe"}
SENTENCEPIECE = {".model", ".spm"}
PICTURES = re.compile(r"assets/[\w.-]+\.png", re.ASCII)
NOTICE = re.compile(r"(licen[cs]e|notice|copying|use_policy)([\w.-]*)", re.IGNORECASE | re.ASCII)
KINDS = "safetensors; JSON, YAML, Markdown, Jinja and plain text; sentencepiece models; licences and notices; pictures of a card"
_RUNS = {
    suffix: kind
    for kind, suffixes in {
        "a pickle, which runs code when it is loaded": ".bin .pt .pth .ckpt .pkl .pickle .joblib .npy .npz .dill .pt2",
        "a program": ".py .pyw .pyc .pyd .so .dll .dylib .exe .sh .bat .cmd .ps1 .ipynb .js .wasm .jar .vbs .rb .pl",
        "a web page, which runs what is in it": ".html .htm .svg .xhtml",
        "an archive, which nobody looks through": ".zip .tar .gz .7z .bz2 .xz .zst .rar",
        "not safetensors": ".h5 .hdf5 .msgpack .onnx .pb .tflite .gguf .keras .mar",
    }.items()
    for suffix in suffixes.split()
}  # only for the wording of a refusal: unlisted kinds are refused too
_BEGINS = {
    b"\x80": "a pickle, which runs code when it is loaded", b"PK": "a zip archive, as torch.save writes",
    b"\x7fELF": "a program", b"MZ": "a program", b"#!": "a program", b"\x1f\x8b": "an archive, which nobody looks through",
}  # fmt: skip
_CALLS = {
    "GLOBAL",
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "REDUCE",
    "BUILD",
}  # opcodes that run code in a pickle
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_PNG = (b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82")


def is_notice(name: str) -> bool:
    """Whether a file at the top of a model's folder is a licence text or notice that copies have to include."""
    match = NOTICE.fullmatch(name)
    return match is not None and _suffix(name) in ("", ".txt", ".md")


def why_not_named(name: str) -> str | None:
    """Why no file of this name can be published; None if one can."""
    suffix = _suffix(name)
    if suffix == WEIGHTS or suffix in TEXT or suffix in SENTENCEPIECE or PICTURES.fullmatch(name):
        return None
    if is_notice(PurePosixPath(name).name):
        return None
    return _RUNS.get(suffix) or f"not of a kind that can be published ({KINDS})"


def why_not(name: str, data: bytes) -> str | None:
    """Why this file, which holds no weights, cannot be published; None if it can.

    Args:
        name: Path in the folder, with slashes.
        data: Its content.
    """
    if (refusal := why_not_named(name)) is not None:
        return refusal
    if PICTURES.fullmatch(name):
        complete = data.startswith(_PNG[0]) and data.find(_PNG[1]) + len(_PNG[1]) == len(data)
        return None if complete else "not a picture, as its name says"
    if _suffix(name) in SENTENCEPIECE and data.startswith(b"\n"):  # the vocabulary is the first field
        return None
    return _why_not_text(name, data)


def _why_not_text(name: str, data: bytes) -> str | None:
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    for begin, kind in _BEGINS.items():
        if start.startswith(begin):
            return kind
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "not text in UTF-8, as its name says"
    if _is_pickle(data):
        return "a pickle, which runs code when it is loaded"
    if match := _CONTROL.search(text):
        return f"not plain text: it holds the control character {match[0]!r}"
    if _suffix(name) in (".yaml", ".yml", ".md") and "!!python" in text:
        return "YAML that makes Python objects"
    if _suffix(name) == ".json":
        try:
            json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            return "not JSON, as its name says"
    return None


def _is_pickle(data: bytes) -> bool:
    """Whether it is a complete pickle of any protocol that calls something; protocol 0 is plain text."""
    names = set()
    try:
        for opcode, _, _ in pickletools.genops(data):
            names.add(opcode.name)
    except Exception:  # not a pickle, which is reported in many ways
        return False
    return bool(names & _CALLS)


def _suffix(name: str) -> str:
    """The suffix in lower case; a version number, as in ``LICENSE-2.0``, is not a suffix."""
    suffix = PurePosixPath(name).suffix.lower()
    return "" if re.fullmatch(r"\.\d+", suffix) else suffix
