"""Names in the package are nouns of the field, and not words that stand for anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hf_quant

HOUSE = Path(hf_quant.__file__).parent
EMPTY_WORDS = {"made", "found", "own", "each", "some", "there", "said", "told", "meant", "here"}


def empty_names(root: Path) -> Iterator[str]:
    """Variables, arguments, functions and classes that are called like one of these words."""
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case (
                    ast.Name(id=name, ctx=ast.Store())
                    | ast.arg(arg=name)
                    | ast.FunctionDef(name=name)
                    | ast.ClassDef(name=name)
                ):
                    if name.strip("_").lower() in EMPTY_WORDS:
                        yield f"{path.relative_to(root)}:{node.lineno}: {name}"


def test_names_are_nouns(tmp_path: Path) -> None:
    assert list(empty_names(HOUSE)) == []
    (tmp_path / "bad.py").write_text("def _made(own):\n    found, ok = own\n    return [each for each in found]\n")
    assert list(empty_names(tmp_path)) == ["bad.py:1: _made", "bad.py:1: own", "bad.py:2: found", "bad.py:3: each"]
