"""No format is named outside ``hf_quant/formats``: what the others want to know of one, they ask its class."""

import ast
from collections.abc import Iterator
from pathlib import Path

import hf_quant
from hf_quant import _plugins
from hf_quant.formats import formats

ROOT = Path(hf_quant.__file__).parent
NAMES = {*formats()} | {fmt.label for fmt in formats().values()} | {m for f in formats().values() for m in f.methods}
NAMES -= {"hf_quant"}  # the package itself
OTHERS = {*_plugins.names("methods"), *_plugins.names("transforms")}  # GPTQ, AWQ and HQQ are also ways to choose codes
ALLOWED = {  # file and string: what it means there
    ("cli/doctor.py", "compressed-tensors"): "a package, whose version is shown",
    ("core/scheme_names.py", "mxfp4"): "a kind of codes that users name",
    ("publish/licence.py", "gemma"): "a licence",
    **{("jobs/engine_rules.py", name): "what an engine reads" for name in ("awq", "compressed_tensors", "gptq", "mlx")},
    **{("solve/recipes.py", name): "a method or transform" for name in ("gptq", "awq")},
    **{("publish/sentences.py", name): "a method or transform" for name in ("gptq", "awq", "hqq")},
}  # fmt: skip


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and value of every string of a module but its docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                  if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def named(source: str) -> list[tuple[int, str]]:
    """Line and name of every format that a module names."""
    return [(line, value) for line, value in strings(ast.parse(source)) if value in NAMES]


def test_only_formats_name_formats() -> None:
    found: dict[tuple[str, str], int] = {}
    for file in ROOT.rglob("*.py"):
        place = file.relative_to(ROOT).as_posix()
        if not place.startswith("formats/"):
            found |= {(place, value): line for line, value in named(file.read_text(encoding="utf-8"))}
    assert not {f"{place}:{line}: {name!r}" for (place, name), line in found.items() if (place, name) not in ALLOWED}
    assert not ALLOWED.keys() - found.keys(), "no longer needed"
    besides = ("cli/doctor.py", "core/scheme_names.py", "jobs/engine_rules.py", "publish/licence.py")
    assert {name for place, name in ALLOWED if place not in besides} <= OTHERS


def test_the_search_finds_a_name() -> None:
    assert named('"""native"""\nif fmt == "native":\n    """awq"""\n') == [(2, "native"), (3, "awq")]
    assert named("def f():\n    'gptq'\n    return 'other'\n") == []
