"""Which folders a command may replace, and which it must not touch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_quant.errors import HfQuantError
from hf_quant.jobs.outputs import CONVERSION, RECIPE, check_output, claimed, output, record, shown


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An input that lies in a folder; the current folder is another one."""
    folder = tmp_path / "models" / "float"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    return folder


def written(folder: Path, name: str = RECIPE) -> Path:
    """A folder as a command leaves it."""
    (folder / "1_Pooling").mkdir(parents=True)
    for file in ("model.safetensors", "1_Pooling/config.json"):
        (folder / file).write_text("{}")
    (folder / name).write_text(json.dumps(record(folder)))
    (folder / "results.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda model: model, "is the input"),
        (lambda model: model / ".", "is the input"),
        (lambda model: model.parent / "x" / ".." / model.name, "is the input"),
        (lambda model: model.parent, "holds the input"),
        (lambda model: model.parent.parent, "holds the current folder|is the current folder, or holds it"),
        (lambda model: model / "out", "lies in the input"),
        (lambda model: model / "deep" / "out", "lies in the input"),
        (lambda model: Path(), "no name of its own"),
        (lambda model: Path(".."), "no name of its own"),
        (lambda model: Path("/"), "no name of its own"),
        (lambda model: Path.cwd(), "is the current folder"),
        (lambda model: Path.cwd().parent, "is the current folder"),
        (lambda model: model.parent / ("n" * 240), "has 240 bytes"),
        (lambda model: Path(os.fsdecode(os.fsencode(model.parent) + b"/caf\xe9")), r"caf\\udce9: is not valid UTF-8"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_places_that_are_never_written(model: Path, place: Callable[[Path], Path], said: str, overwrite: bool) -> None:
    (model.parent / "x").mkdir()
    for folder in (model, model.parent):  # not even where it looks like something that hf-quant wrote
        (folder / RECIPE).write_text(json.dumps({"versions": {"hf-quant": "0"}}))
    with pytest.raises(HfQuantError, match=said), output(place(model), [model], overwrite=overwrite):
        pytest.fail("the body must not run")
    assert (model / "config.json").read_text() == "{}"


def test_links_lead_to_inputs_too(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(model)
    for out, inputs in ((link, [model]), (model, [link]), (link / "out", [model])):
        with pytest.raises(HfQuantError, match="input"):
            check_output(out, inputs, overwrite=True)
    blobs = written(tmp_path / "blobs")  # the weights of the input are links into a folder of our own
    (model / "model.safetensors").symlink_to(blobs / "model.safetensors")
    with pytest.raises(HfQuantError, match="blobs: holds the input"):
        check_output(blobs, [model], overwrite=True)
    text = tmp_path / "q" / "text.txt"
    written(text.parent)
    text.write_text("calibrate on this")
    with pytest.raises(HfQuantError, match=r"q: holds the input .*text.txt"):
        check_output(text.parent, ["some/model", text], overwrite=True)


def test_only_what_hf_quant_wrote_is_replaced(tmp_path: Path) -> None:
    for i, name in enumerate((RECIPE, CONVERSION)):
        out = written(tmp_path / str(i), name)
        with pytest.raises(HfQuantError, match="exists and is not empty; --overwrite"):
            check_output(out)
        check_output(out, overwrite=True)
        for later in ("README.md", "report.html", "ladder.json", "assets/quality-light.png"):
            (out / later).parent.mkdir(exist_ok=True)
            (out / later).write_text("")
        check_output(out, overwrite=True)
        for stranger in ("notes.txt", "1_Pooling/mine.py", "mine/deep"):
            (out / stranger).parent.mkdir(exist_ok=True)
            (out / stranger).write_text("precious")
            with pytest.raises(
                HfQuantError, match=f"holds {stranger.split('/deep')[0]}, which hf-quant did not write"
            ):
                check_output(out, overwrite=True)
            (out / stranger).unlink()
            if stranger == "mine/deep":
                (out / "mine").rmdir()
    check_output(tmp_path / "none", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"versions": 1}', '{"versions": {"torch": "2"}}', "[" * 99999]
)
def test_a_record_of_somebody_else_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text(content)
    with pytest.raises(HfQuantError, match="was not written by hf-quant"):
        check_output(tmp_path, overwrite=True)
    (tmp_path / RECIPE).write_text('{"versions": {"hf-quant": "0"}}')  # before files were listed
    check_output(tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(HfQuantError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)


def test_what_appears_in_the_meantime_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for overwrite in (False, True):
        with pytest.raises(HfQuantError, match=r"out: (exists|was not)"), output(out, overwrite=overwrite) as stage:
            (stage / "new").write_text("1")
            out.mkdir(exist_ok=True)
            (out / "mine").write_text("precious")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (out / "mine").read_text() == "precious"
        (out / "mine").unlink()


def test_two_cannot_claim_one_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with claimed(tmp_path / "out"), pytest.raises(HfQuantError, match="another process"), claimed(tmp_path / "link"):
        pytest.fail("the body must not run")
    assert not list(tmp_path.glob(".*"))


def test_inputs_must_have_names_that_can_be_opened(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    with pytest.raises(HfQuantError, match=r"caf\\udce9: is not valid UTF-8"):
        check_output(tmp_path / "q", [odd])


def test_paths_are_shown_without_control_characters() -> None:
    assert shown(Path("a\nb\x1b[31m\u202e é")) == "a\\nb\\x1b[31m\\u202e é"
    assert shown(os.fsdecode(b"caf\xe9")) == "caf\\udce9"
