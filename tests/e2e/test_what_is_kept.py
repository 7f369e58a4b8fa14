"""What the folder that a command writes has besides quantized layers, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.cli import main
from hf_quant.disk.journal import Journal
from hf_quant.hf.loading import skeleton
from hf_quant.hf.shards import unclaimed
from tests.e2e.conftest import IDS, ZOO
from tests.yardsticks import tokenizer

CALIBRATED = ("--method", "gptq", "--calibration-tokens", "256")
EXTRA = {
    "model.layers.2.eh_proj.weight": torch.randn(64, 128, generator=torch.Generator().manual_seed(0)),
    "mtp.norm.weight": torch.ones(64, dtype=torch.bfloat16), "mtp.steps": torch.arange(3),
}  # fmt: skip


def run(*args: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def model(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tensors that its class does not know, and a text to calibrate on."""
    folder = tmp_path_factory.mktemp("kept") / "model"
    shutil.copytree(zoo("llama")[1], folder)
    save_file(load_file(folder / "model.safetensors") | EXTRA, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    (folder / "calibration.txt").write_text("The quick brown fox jumps over the lazy dog. " * 50)
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "secret.json").symlink_to("/etc/hostname")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the files that the index names, or in the only one."""
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"] if index.is_file() else None
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            assert where is None or all(where[name] == file.name for name in opened.keys())  # noqa: SIM118
    assert where is None or where.keys() == found.keys()
    return found


@pytest.mark.parametrize(
    "options",
    [("--format", "native"), ("--format", "compressed-tensors", "--max-shard-size", "50KB"), CALIBRATED],
    ids=["native", "compressed-tensors in shards", "calibrated"],
)
def test_tensors_that_no_module_takes_are_kept(
    model: Path, zoo: Any, tmp_path: Path, options: tuple[str, ...]
) -> None:
    said = run("quantize", model, "-o", tmp_path / "q", "--group-size", 32, "--no-eval", *options).stderr
    assert "model.layers.2.eh_proj.weight, mtp.norm.weight, mtp.steps: no module of the model takes these" in said
    assert "secret.json: is a link out of the model's folder, so it is not copied" in said
    found = tensors(tmp_path / "q")
    for name, tensor in EXTRA.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    recipe, config = (json.loads((tmp_path / "q" / f"{name}.json").read_text()) for name in ("recipe", "config"))
    assert recipe["unclaimed"] == sorted(EXTRA)
    stored = config["quantization_config"]
    left = stored["ignore"] if "ignore" in stored else stored["modules_to_not_convert"]
    assert "model.layers.2.eh_proj" in left and not any(name.startswith("mtp") for name in left)
    assert json.loads((tmp_path / "q" / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
    assert (tmp_path / "q" / "modules.json").is_file() and not (tmp_path / "q" / "secret.json").exists()
    assert set(recipe["files"]) >= {"1_Pooling/config.json", "modules.json", "config.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "q").iterdir() if path.is_file()} == {0o644}
    assert run("verify", tmp_path / "q", "-q").stdout == "sound\n"
    if options != CALIBRATED:
        run("quantize", zoo("llama")[1], "-o", tmp_path / "plain", "--group-size", 32, "--no-eval", *options)
        with torch.no_grad():
            one, other = (hf_quant.load(str(tmp_path / name))(IDS).logits for name in ("q", "plain"))
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ZOO)
def test_ordinary_models_have_none(zoo: Any, name: str) -> None:
    _, folder = zoo(name)
    assert unclaimed(Checkpoint.open(folder), skeleton(str(folder))) == []


def test_convert_takes_along_what_belongs_to_the_model(model: Path, tmp_path: Path) -> None:
    run("quantize", model, "-o", tmp_path / "q", "--group-size", 32, "--no-eval", "-q")
    (tmp_path / "q" / "stolen.json").symlink_to("/etc/hostname")
    (tmp_path / "q" / "LICENSE").write_text("free")
    (tmp_path / "q" / "heldout.txt").write_text("private")
    said = run("convert", tmp_path / "q", "--to", "gptq", "-o", tmp_path / "c").stderr
    assert "stolen.json: is a link out of the model's folder" in said
    for name in ("1_Pooling/config.json", "modules.json", "LICENSE", "recipe.json"):
        assert (tmp_path / "c" / name).is_file()
    assert not {"stolen.json", "heldout.txt", "results.json"} & {path.name for path in (tmp_path / "c").iterdir()}
    assert {name: t.tolist() for name, t in tensors(tmp_path / "c").items() if name in EXTRA} == {
        name: t.tolist() for name, t in EXTRA.items()
    }
    run("convert", tmp_path / "q", "--to", "dense", "-o", tmp_path / "c", "--overwrite")
    (tmp_path / "c" / "mine.txt").write_text("precious")
    said = run("convert", tmp_path / "q", "--to", "gptq", "-o", tmp_path / "c", "--overwrite", code=1).stderr
    assert "holds mine.txt, which hf-quant did not write" in said and (tmp_path / "c" / "mine.txt").exists()


def test_finished_blocks_of_another_run_stay(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that needs no calibration does not throw away what another one has worked for."""
    out, add, parts = tmp_path / "q", Journal.add, []

    def stopping(self: Any, *args: Any) -> None:
        add(self, *args)
        parts.append(args[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopping)
        run("quantize", model, "-o", out, "--group-size", 32, "--no-eval", *CALIBRATED, code=130)
    run("quantize", model, "-o", out, "--group-size", 32, "--no-eval", "-q")
    assert (tmp_path / "q.work" / parts[0]).is_file()
    said = run("quantize", model, "-o", out, "--group-size", 32, "--no-eval", "--overwrite", *CALIBRATED).stderr
    assert "1 of 2 blocks are done already" in said and not (tmp_path / "q.work").exists()
    assert AutoModelForCausalLM.from_pretrained(out)
