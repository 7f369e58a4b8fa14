"""Which files go along with a model, and which do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_quant.jobs.companions import companions, copy_companions, inside

KEPT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt", "spiece.model",
    "qwen.tiktoken", "chat_template.jinja", "preprocessor_config.json", "generation_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json",
    "2_Dense/model.safetensors", "additional_chat_templates/tools.jinja",
)  # fmt: skip
LEFT = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md", "heldout.txt",
    "calibration.txt", "notes.txt", "optimizer.pt", "trainer_state.json", "results.json", "recipe.json", "conversion.json",
    "quantize_config.json", "manifest.json", ".env.json", "2_Dense/pytorch_model.bin", "checkpoint-5/tokenizer.json",
    "onnx/model.onnx", "modeling_mine.py", "outside/secret.json",
)  # fmt: skip
NOTICES = ("LICENSE", "LICENSE-APACHE.txt", "NOTICE.md")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with all of that in it."""
    folder = tmp_path / "model"
    for name in (*KEPT, *LEFT, *NOTICES, "LICENSE.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    parts = ["", "1_Pooling", "2_Dense", "../outside", "/etc", "..", "missing", 5]
    (folder / "modules.json").write_text(json.dumps([{"path": path} for path in parts] + ["odd"]))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("secret")
    return folder


def test_what_belongs_to_a_model(model: Path) -> None:
    assert companions(model) == sorted(KEPT)
    assert companions(model, notices=True) == sorted((*KEPT, *NOTICES))
    assert "modeling_mine.py" not in companions(model, code=True)
    (model / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_mine.Mine"}}')
    assert "modeling_mine.py" in companions(model, code=True) and "modeling_mine.py" not in companions(model)
    (model / "modules.json").write_text("[" * 99999)
    assert "1_Pooling/config.json" not in companions(model)


def test_links_are_followed_inside_the_folder_only(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    secret, stage = tmp_path / "outside" / "secret.json", tmp_path / "stage"
    stage.mkdir()
    (stage / "tokenizer.json").write_text("its own")
    (model / "stolen.json").symlink_to(secret)
    (model / "1_Pooling" / "stolen.json").symlink_to(secret)
    (model / "additional_chat_templates" / "folder").symlink_to(secret.parent)
    (model / "dangling.json").symlink_to(tmp_path / "nowhere")
    (model / "same.json").symlink_to(model / "tokenizer_config.json")
    copy_companions(model, stage, said.append)
    copied = {path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()}
    assert copied == {*KEPT, "same.json"} and not any(path.is_symlink() for path in stage.rglob("*"))
    assert (stage / "tokenizer.json").read_text() == "its own"
    assert len(said) == 2 and all("stolen.json: is a link out of the model's folder" in line for line in said)


def test_a_snapshot_of_the_hub_links_to_its_own_blobs(tmp_path: Path) -> None:
    """Of another model's it may not be."""
    for repo in ("models--a--b", "models--c--d"):
        (tmp_path / repo / "blobs").mkdir(parents=True)
        (tmp_path / repo / "blobs" / "0123").write_text("{}")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "f00"
    snapshot.mkdir(parents=True)
    (snapshot / "good.json").symlink_to("../../blobs/0123")
    (snapshot / "bad.json").symlink_to("../../../models--c--d/blobs/0123")
    assert inside(snapshot / "good.json", snapshot) and not inside(snapshot / "bad.json", snapshot)
