"""A Hub id where a command takes a model: its recipe is read as that of a folder is, and what is not there is said in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hf_quant.cli.bench import _base
from hf_quant.data.held_out import HeldOut
from hf_quant.data.text import paragraphs
from hf_quant.errors import HfQuantError
from hf_quant.jobs.base import base_of, recipe_of
from hf_quant.jobs.progress import reporting
from hf_quant.jobs.texts import check_overlap

from .conftest import run
from .fakehub import FakeHub

MODEL = "alice/q"


@pytest.fixture
def recipe_on_the_hub(hub: FakeHub, api: HfApi, measured: Path, tmp_path: Path) -> str:
    """Its recipe names a base on the Hub, and a text that was calibrated on; gives the text."""
    text = "a text that was calibrated on, which is long enough to be told from others " * 4
    recipe = json.loads((measured / "recipe.json").read_text())
    calibration = {"name": "x", "sequences": 1, "context": 8, "sha256": "0", "paragraphs": sorted(paragraphs(text))}
    recipe |= {"source": {"model": "alice/base", "revision": "abc"}, "calibration": calibration}
    shutil.copytree(measured, tmp_path / "sent")
    (tmp_path / "sent" / "recipe.json").write_text(json.dumps(recipe))
    api.create_repo(MODEL)
    api.upload_folder(repo_id=MODEL, folder_path=tmp_path / "sent")
    return text


def test_the_recipe_of_a_model_on_the_hub(hub: FakeHub, api: HfApi, recipe_on_the_hub: str) -> None:
    recipe = recipe_of(MODEL)
    assert base_of(MODEL, recipe, None) == ("alice/base", "abc")
    with reporting(False, None) as report:
        assert _base(MODEL, recipe, None, {"dtype": "auto"}, report) == {
            "base": ("alice/base", {"dtype": "auto", "revision": "abc"})
        }
    with pytest.raises(HfQuantError, match="1 of 1 paragraphs"):
        check_overlap(recipe, HeldOut("text", recipe_on_the_hub))
    api.create_repo("alice/plain")
    assert recipe_of("alice/plain") == {}
    with pytest.raises(HfQuantError, match="the Hub gives no model of that name"):
        recipe_of("alice/nothing")


@pytest.mark.usefixtures("recipe_on_the_hub")
def test_what_the_hub_does_not_have_is_said_in_a_line() -> None:
    for command in ("inspect", "verify"):
        missing = run(command, "alice/nothing", code=1).stderr
        assert "the Hub gives no model of that name" in missing and missing.count("\n") == 1
        missing = run(command, MODEL, "--revision", "nothing", code=1).stderr
        assert "alice/q: has no such revision on the Hub" in missing and missing.count("\n") == 1
