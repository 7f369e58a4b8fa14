"""Integrations use the public names of this package, which knows none of them."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_quant
from hf_quant.core.layout import PARTS

ROOT = Path(__file__).parents[2]
HOSTS = sorted(file.parent for file in (ROOT / "integrations").glob("*/requirements.txt"))


def used(file: Path) -> Iterator[str]:
    """Every module that a file imports and every name it takes from one, dotted: ``hf_quant.load``."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_a_host_uses_public_names_only(host: Path) -> None:
    public = {"hf_quant", *(f"hf_quant.{name}" for name in hf_quant.__all__)}
    files = [host.parent / "conftest.py", *host.rglob("*.py")]
    assert any(file.name.startswith("test_") for file in files) and (host / "README.md").is_file()
    for file in files:
        taken = {name for name in used(file) if name.partition(".")[0] == "hf_quant"}
        assert taken <= public, f"{file}: {sorted(taken - public)}"


def test_the_package_knows_no_integration() -> None:
    assert HOSTS
    for file in (ROOT / "hf_quant").rglob("*.py"):
        roots = {name.partition(".")[0] for name in used(file)}
        assert not [root for root in roots if root == "integrations" or root.startswith("hf_quant_")], file


def test_the_page_is_what_the_tests_of_the_hosts_saw() -> None:
    matrix = runpy.run_path(str(ROOT / "integrations/matrix"))
    seen = matrix["results"]()
    assert seen.keys() <= {host.name for host in HOSTS}
    assert (ROOT / "docs/hosts.md").read_text(encoding="utf-8") == matrix["page"](seen)


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_an_adapter_was_tried_with_the_version_that_is_required(host: Path) -> None:
    """Of another one the adapter warns."""
    texts = [file.read_text() for file in host.rglob("src/**/*.py")]
    tried = re.findall(r'^TRIED = "(.+)"$', "\n".join(texts), re.MULTILINE)
    required = (host / "requirements.txt").read_text().split("==")[1]
    assert len(tried) == (host / "pyproject.toml").is_file()
    assert all(required.startswith(version) for version in tried)


def test_vllm_takes_every_tensor_of_a_layer() -> None:
    """One that its plug-in has no parameter for, vLLM does not load."""
    tree = ast.parse((ROOT / "integrations/vllm/src/hf_quant_vllm/arriving.py").read_text())
    names = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES"
    )
    assert isinstance(names, ast.Dict)
    assert {ast.literal_eval(name) for name in names.keys if name is not None} == set(PARTS)
