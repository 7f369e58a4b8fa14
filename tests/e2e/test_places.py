"""Commands whose output would harm an input are refused at once, and harm nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hf_quant.cli import main

FIXTURES = Path(__file__).parents[1] / "golden" / "fixtures"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "place",
    [
        lambda model: model, lambda model: model.parent, lambda model: model / "out", lambda model: model.parent / "link",
        lambda model: Path(), lambda model: Path(".."), lambda model: model.parent / "mine",
    ],
    ids=["the model", "above it", "in it", "a link to it", "here", "above here", "a stranger's folder"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["quantize", "ladder", "convert"])
def test_inputs_and_strangers_are_not_replaced(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: Callable[[Path], Path]
) -> None:
    model = tmp_path / "models" / "m"
    shutil.copytree(FIXTURES / "gptq-4bit" if command == "convert" else zoo("llama")[1], model)
    (model.parent / "link").symlink_to(model)
    for name in ("models/mine/notes.txt", "here/deep/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("precious")
    monkeypatch.chdir(tmp_path / "here" / "deep")
    before = contents(tmp_path)
    more = {"quantize": ("--group-size", 32, "--no-eval"), "ladder": ("--max-kl", 9), "convert": ("--to", "dense")}
    args = [command, model, "-o", place(model), "--overwrite", *more[command]]
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and contents(tmp_path) == before
    assert any(why in result.stderr for why in ("the input", "no name of its own", "not written by hf-quant"))
