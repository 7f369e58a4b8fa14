"""No tensor of numbers is made in the default dtype, which belongs to whoever calls: compiled code would write past its end."""

import ast
from collections.abc import Iterator
from pathlib import Path

import hf_quant

MAKERS = {"empty", "zeros", "ones", "rand", "randn", "linspace", "logspace", "eye", "full", "normal"}


def without_dtype(code: str) -> Iterator[str]:
    """Calls such as ``torch.zeros(3)``, with their lines."""
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
            and node.func.attr in MAKERS
            and not any(keyword.arg == "dtype" for keyword in node.keywords)
        ):
            yield f"{node.lineno}: {ast.unparse(node)}"


def test_every_new_tensor_has_a_dtype() -> None:
    folder = Path(hf_quant.__file__).parent
    calls = {
        f"{file.relative_to(folder)}:{call}"
        for file in folder.rglob("*.py")
        for call in without_dtype(file.read_text(encoding="utf-8"))
    }
    assert not calls


def test_the_search_finds_a_call() -> None:
    assert list(without_dtype("x = torch.zeros(3)\ny = torch.eye(2, dtype=d)\nz = x.new_zeros(3)")) == [
        "1: torch.zeros(3)"
    ]
