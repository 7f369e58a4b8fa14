"""All texts that a reader of a file could see: the text itself, the strings of its JSON or YAML, and their decoded values."""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any
from urllib.parse import unquote

import yaml

from hf_quant.errors import PushError
from hf_quant.publish.secrets import SHORTEST

DEEPEST = 4  # nested encodings
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "0": "\0", "a": "\a", "e": "\x1b"}
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)
_ENCODED = re.compile(r"[\\%&]|[A-Za-z0-9+/_-]{16}|[^\x00-\x7f]")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")
_FRONT = re.compile(r"\s*---\r?\n(.*?)\r?\n---", re.DOTALL)


def views(name: str, data: bytes) -> Iterator[str]:
    """The text of a file, and its strings with one layer of escapes or encoding removed after the other.

    Args:
        name: Name of the file, whose suffix tells its type.
        data: Its content, or of a safetensors file the part before the tensors.

    Yields:
        Texts with one string a line, without strings that came before.

    Raises:
        PushError: It is not valid JSON or YAML, as its name says.
    """
    strings = strings_of(name, data)
    if strings is None:
        yield (text := data.decode("utf-8", "replace"))
        strings = text.splitlines()
    known = {string for string in strings if len(string) >= SHORTEST}
    pending = sorted(known)
    for _ in range(DEEPEST):
        if not pending:
            return
        yield "\n".join(pending)
        new = {other for string in pending if _ENCODED.search(string) for other in _decoded(string)}
        pending = sorted(other for other in new - known if len(other) >= SHORTEST)
        known |= new


def strings_of(name: str, data: bytes) -> list[str] | None:
    """All strings of a JSON or YAML file, decoded, keys included; None for other files.

    Raises:
        PushError: It is not valid JSON or YAML, as its name says.
    """
    suffix = PurePath(name).suffix.lower()
    try:
        if suffix == ".safetensors":
            return _json(data[8:])
        if suffix == ".json":
            return _json(data)
        if suffix == ".jsonl":
            return [string for line in data.split(b"\n") if line.strip() for string in _json(line)]
        if suffix in (".yaml", ".yml"):
            return _yaml(data.decode("utf-8"))
        if suffix == ".md":
            text = data.decode("utf-8")
            front = _FRONT.match(text)
            return [text, *(_yaml(front[1]) if front else [])]
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "YAML" if isinstance(error, yaml.YAMLError) else "JSON" if "json" in suffix else "text in UTF-8"
        raise PushError(f"{name}: is not {kind}, as its name says") from None
    return None


def _json(data: bytes) -> list[str]:
    """Strings of a JSON text, and ``key=value`` where both are strings; duplicate keys are included."""
    strings: list[str] = []

    def pairs(members: list[tuple[str, Any]]) -> None:
        for key, value in members:
            strings.append(key)
            if isinstance(value, str):
                strings.append(f"{key}={value}")
            keep(value)

    def keep(value: Any) -> None:
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, list):
            for item in value:
                keep(item)

    keep(json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs))
    return strings


def _yaml(text: str) -> list[str]:
    """Scalars of a YAML text, decoded and folded; no objects are built, so no code runs."""
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    return [text, *(event.value for event in events if isinstance(event, yaml.ScalarEvent))]


def _decoded(text: str) -> Iterator[str]:
    """``text`` decoded from each encoding that it could be in."""
    if "\\" in text:
        yield _ESCAPE.sub(_letter, text)
    if "%" in text:
        yield unquote(text, errors="replace")
    if "&" in text:
        yield html.unescape(text)
    if not text.isascii():
        yield _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    yield from _base64(text)


def _letter(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    if code is None:
        return _LETTERS.get(match[4], match[4])
    return chr(int(code, 16)) if int(code, 16) < 0x110000 else " "


def _base64(text: str) -> Iterator[str]:
    """The decoded text, if it is readable."""
    for match in _BASE64.finditer(text):
        word = match[0].rstrip("=").replace("-", "+").replace("_", "/")
        try:
            decoded = base64.b64decode(word + "=" * (-len(word) % 4))
        except binascii.Error:
            continue
        if len(decoded) >= SHORTEST and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in decoded):
            yield decoded.decode("ascii")
