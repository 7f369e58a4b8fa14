"""What must not leave the machine: tokens, the names of its folders, and anything that runs when it is loaded."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from hf_quant.errors import PushError

SECRETS = {
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22})"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "somebody's home directory": re.compile(r"(?:/home/|/Users/|[A-Za-z]:(?:\\){1,2}Users(?:\\){1,2})[\w.-]+"),
}
RUNS = {
    suffix: kind
    for kind, suffixes in {
        "a pickle, which runs code when it is loaded": ".bin .pt .pth .ckpt .pkl .pickle .joblib .npy .npz .dill",
        "a program": ".py .pyc .pyd .so .dll .dylib .exe .sh .bat .ps1 .ipynb",
        "not safetensors": ".h5 .hdf5 .msgpack .onnx .pb .tflite .gguf",
    }.items()
    for suffix in suffixes.split()
}
BEGINS = {
    b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle", b"\x80\x05": "a pickle",
    b"PK\x03\x04": "a zip archive, as torch.save writes", b"\x7fELF": "a program", b"MZ\x90": "a program",
    b"#!": "a program",
}  # fmt: skip
_NAME = re.compile(r"[\w+ ().-]+(/[\w+ ().-]+)*", re.ASCII)


def files_of(folder: Path) -> list[str]:
    """Names of everything to be published, hidden files left out.

    Raises:
        PushError: There is a pickle, a program, a link, or a name that the Hub would not take.
    """
    made = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or (path.is_dir() and not path.is_symlink()):
            continue
        if (refusal := _refusal(path, name)) is not None:
            raise PushError(f"{name}: {refusal}; it is not published")
        made.append(name)
    return made


def _refusal(path: Path, name: str) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "not a regular file"
    if not _NAME.fullmatch(name):
        return "its name holds odd characters"
    if (kind := RUNS.get(path.suffix.lower())) is not None:
        return kind
    with path.open("rb") as file:
        head = file.read(8)
    if path.suffix != ".safetensors":  # there the first bytes are a length
        return next((kind for begin, kind in BEGINS.items() if head.startswith(begin)), None)
    return None


def check_private(
    folder: Path,
    names: Iterable[str],
    written: Mapping[str, bytes] = MappingProxyType({}),
    secrets: Iterable[str] = (),
) -> None:
    """Refuse where a text file, or the header of a safetensors file, tells what it should not.

    Args:
        folder: Where the files are.
        names: Of the files.
        written: Those of them that are still to be written.
        secrets: Words that must not be found, such as the token in use.

    Raises:
        PushError: Names the file and what kind of thing is in it, never the thing.
    """
    words = {secret: "the token in use" for secret in secrets if secret}
    words |= dict.fromkeys(_places(folder), "the name of a folder of this machine")
    for name in names:
        text = written[name].decode("utf-8", "replace") if name in written else _text(folder / name)
        for kind, pattern in SECRETS.items():
            if pattern.search(text):
                raise PushError(f"{name}: holds {kind}")
        for word, kind in words.items():
            if word in text:
                raise PushError(f"{name}: holds {kind}")


def _text(path: Path) -> str:
    """Of a file; of weights only the header, of pictures what happens to be readable."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", file.read(8))
            return file.read(length).decode("utf-8", "replace")
        return file.read().decode("utf-8", "replace")


def _places(folder: Path) -> set[str]:
    """Folders of this machine that nothing published should name; one as short as ``/tmp`` says nothing."""
    places = {str(folder.resolve().parent), str(Path.cwd())}
    return {place for place in places if place.count(os.sep) >= 2} | {f"{Path.home()}{os.sep}"} - {os.sep * 2}
