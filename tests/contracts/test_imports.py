"""Imports by string are imports too: who may write them, and no circle and no way upwards where they are counted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

import hf_quant

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(hf_quant.__file__).parent
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
FACE, LOADER = "hf_quant", "hf_quant._plugins"  # the only modules that may import by string
BY_STRING = {"import_module", "__import__", "resolve_name", "walk_packages"}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), ast.parse(file.read_text(encoding="utf-8"))


def called(node: ast.AST) -> str:
    """Name of the function that is called or passed on, wherever it was imported from."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def string_imports(tree: ast.Module) -> Iterator[str]:
    """What is imported by string: a module, or the start of its name where the rest is computed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node.func) in BY_STRING and node.args:
            name = node.args[0]
            parts = name.values if isinstance(name, ast.JoinedStr) else [name]
            yield parts[0].value if isinstance(parts[0], ast.Constant) else ""


def plugin_loads(tree: ast.Module) -> Iterator[str]:
    """Folders whose plug-ins are loaded by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_plugins.load":
            folder = node.args[0]
            yield f"hf_quant.{folder.value}" if isinstance(folder, ast.Constant) else ""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """All imports below the face, those by string and those of plug-ins among them."""
    built = grimp.build_graph("hf_quant", cache_dir=None)
    for module, tree in trees():
        for target in (*string_imports(tree), *plugin_loads(tree)):
            if target in built.modules and target != module:
                built.add_import(importer=module, imported=target)
    return built


def test_who_imports_by_string() -> None:
    writers = {module for module, tree in trees() for name in string_imports(tree) if name.startswith("hf_quant")}
    assert writers <= {FACE, LOADER}
    computed = {module for module, tree in trees() if "" in {*string_imports(tree), *plugin_loads(tree)}}
    assert computed <= {LOADER}


def test_no_circle(graph: grimp.ImportGraph) -> None:
    modules = graph.modules - {
        FACE
    }  # a face stands before the house: it knows every room, and only a command knows it
    assert graph.find_modules_that_directly_import(FACE) <= {"hf_quant.cli"}
    TopologicalSorter(
        {module: graph.find_modules_directly_imported_by(module) & modules for module in modules}
    ).prepare()  # raises CycleError


def test_no_way_upwards(graph: grimp.ImportGraph) -> None:
    config = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    layers = next(c for c in config["tool"]["importlinter"]["contracts"] if c["name"].startswith("Layers: "))["layers"]
    floor = {room.strip(" ()"): i for i, layer in enumerate(layers) for room in layer.split("|")}
    rooms = {child.rpartition(".")[2] for child in graph.find_children("hf_quant")}
    assert rooms <= floor.keys(), "every room has a floor"
    upwards = [
        f"{module} -> {target}"
        for module in graph.modules - {FACE}
        for target in graph.find_modules_directly_imported_by(module) - {FACE}
        if (a := module.split(".")[1]) != (b := target.split(".")[1]) and floor[a] >= floor[b]
    ]
    assert not upwards


def test_no_contract_is_hollow() -> None:
    config = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"]
    for contract in config["contracts"]:
        assert not contract.get("ignore_imports") and "unmatched_ignore_imports_alerting" not in contract
