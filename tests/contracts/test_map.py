"""The map in CONTRIBUTING.md: every path and function that it names is there, and every folder is on it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAP = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The house")[2].partition("## Rules")[0]
PLACES = sorted(set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|toml)|(?:\w+/)+)(?::([\w.]+))?`", MAP)))
CODE = ROOT / "hf_quant"


def names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Classes, functions and methods, as ``Class.method``."""
    found = set()
    for node in body:
        if isinstance(node, ast.ClassDef):
            found |= {prefix + node.name} | names(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            found.add(prefix + node.name)
        elif isinstance(node, ast.If):  # another definition where something is missing
            found |= names(node.body + node.orelse, prefix)
    return found


def test_the_map_is_a_map() -> None:
    assert len(PLACES) > 60 and sum(bool(name) for _, name in PLACES) > 45
    for question in ("decided", "stored", "used"):
        assert f"**scale of a group, {question}**" in MAP


@pytest.mark.parametrize(("path", "name"), PLACES)
def test_what_the_map_names_is_there(path: str, name: str) -> None:
    file = next((place for place in (CODE / path, ROOT / path) if place.exists()), None)
    assert file is not None, f"{path} does not exist"
    if name:
        assert name in names(ast.parse(file.read_text(encoding="utf-8")).body), f"{path} has no {name}"


def test_every_folder_is_in_the_picture() -> None:
    picture = MAP.partition("```text")[2].partition("```")[0]
    folders = {path.parent.name for path in CODE.glob("*/__init__.py")}
    assert folders == {name.rstrip("/") for name in re.findall(r"(?<!\S)\w+/", picture)}
