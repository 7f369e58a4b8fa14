"""Calibrated quantization, block by block from the shards."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from hf_quant import HfQuantConfig, load
from hf_quant.calibration import Calibration
from hf_quant.checkpoint import Checkpoint
from hf_quant.errors import HfQuantError
from hf_quant.hf.streaming import Settings, quantize_streaming

SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
CONFIGS = {
    "llama": tf.LlamaConfig(**SMALL),
    "llama-tied": tf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": tf.Qwen3Config(**SMALL, head_dim=32),
    "gemma3": tf.Gemma3TextConfig(**SMALL, head_dim=32, sliding_window=8),
    "gpt2": tf.GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=3, n_head=2, initializer_range=0.1),
}
IDS = torch.randint(0, 256, (12, 48), generator=torch.Generator().manual_seed(0))


def make(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, shard: str = "100KB") -> Path:
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def stream(
    source: Path, out: Path, scheme: str = "W3A16-g32", ids: Tensor = IDS, **options: Any
) -> list[dict[str, Any]]:
    shutil.rmtree(out, ignore_errors=True)  # a stage is always new
    out.mkdir()
    config = HfQuantConfig(scheme, **({"method": "gptq"} | options))
    data, quiet = Calibration(ids, "ids", []), Settings(lambda _: None)
    _, blocks = quantize_streaming(source, config, data, out.with_suffix(".work"), out, quiet)
    return blocks


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS[:4]).logits.float()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_it_loses_less_than_rounding(name: str, tmp_path: Path) -> None:
    source = make(tmp_path / "base", name)
    blocks = stream(source, tmp_path / "out", "W4A16-g32")
    base = logits(load(str(source)))
    model = load(str(tmp_path / "out"))
    rounded = load(str(source), quantization_config=HfQuantConfig("W4A16-g32"))

    def lost(each: Any) -> float:
        return ((logits(each) - base).norm() / base.norm()).item()

    assert lost(model) < 0.85 * lost(rounded)
    assert [block["block"] for block in blocks] == [f"{blocks[0]['block'][:-1]}{i}" for i in range(3)]
    assert all(0 < b["error"] < 0.5 and b["sqnr_db"] > 3 and b["layers"] for b in blocks)
    stored, made = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    scales = {made.tensors[n].dtype for n in made.tensors if n.endswith("_scale")}
    assert scales == {"BF16"}
    kept = [n for n in stored.tensors if n in made.tensors and not made.tensors[n].dtype.startswith("U")]
    assert kept and all(torch.equal(stored.read(n), made.read(n)) for n in kept)


@pytest.mark.parametrize(
    ("scheme", "fmt"), [("W4A16-g32-asym", "auto"), ("W8A16-g32", "native"), ("W2A16-g16", "auto")]
)
def test_formats(scheme: str, fmt: str, tmp_path: Path) -> None:
    source = make(tmp_path / "base", "llama")
    stream(source, tmp_path / "out", scheme, format=fmt, overrides={"*.down_proj": "W8A16-g32"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("compressed-tensors" if scheme.startswith("W4") else "hf_quant")
    model = load(str(tmp_path / "out"))
    assert str(model.model.layers[0].mlp.down_proj.scheme) == "W8A16-g32"
    assert str(model.model.layers[0].mlp.up_proj.scheme) == scheme and torch.isfinite(logits(model)).all()


def test_memory_holds_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a block is solved, the others are on the meta device."""
    from hf_quant.hf import streaming

    seen = []
    solve = streaming.solve

    def watched(block: Any, *args: Any) -> Any:
        made = solve(block, *args)
        seen.append(block.module)
        real = [m for m in seen if any(p.device.type != "meta" for p in m.parameters())]
        assert real == [block.module]
        return made

    monkeypatch.setattr(streaming, "solve", watched)
    stream(make(tmp_path / "base", "llama"), tmp_path / "out")
    assert len(seen) == 3


def test_refusals(tmp_path: Path, zoo: Any) -> None:
    source = make(tmp_path / "base", "llama")
    for ask, said in (({"quantize_lm_head": True}, "lm_head is in none"), ({"quantize_embeddings": True}, "in none")):
        with pytest.raises(HfQuantError, match=said):
            stream(source, tmp_path / "out", **ask)
    with pytest.raises(HfQuantError, match="stacked experts"):
        stream(zoo("mixtral")[1], tmp_path / "out")
    with pytest.raises(HfQuantError, match="decoder-only models so far, not T5"):
        stream(zoo("t5")[1], tmp_path / "out")
    stream(source, tmp_path / "out")
    with pytest.raises(HfQuantError, match=r"other settings \(calibration\)"):
        stream(source, tmp_path / "out", ids=IDS.flip(0))
    with pytest.raises(HfQuantError, match="needs calibration data"):
        load(str(source), quantization_config=HfQuantConfig("W4A16-g32", method="gptq"))
    broken = make(tmp_path / "nan", "llama", torch.float32, "1GB")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    from safetensors.torch import save_file

    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HfQuantError, match="NaN or infinite"):
        stream(broken, tmp_path / "bad")


RUN = """
import sys, torch
from pathlib import Path
from tests_streaming import stream
stream(Path(sys.argv[1]), Path(sys.argv[2]))
print("finished")
"""


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL until it gets through: every file is byte for byte that of a run that nobody disturbed."""
    source = make(tmp_path / "base", "llama")
    stream(source, tmp_path / "whole")
    (tmp_path / "tests_streaming.py").write_text(Path(__file__).read_text())
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", RUN, str(source), str(tmp_path / "out")]
    draw, kills, seen = random.Random(0), 0, set()
    journal = tmp_path / "out.work" / "journal.jsonl"
    for _ in range(40):
        with subprocess.Popen(call, stdout=subprocess.PIPE, env=environment) as process:
            lines = len(journal.read_bytes().splitlines()) if journal.exists() else 0
            while process.poll() is None and not (journal.exists() and len(journal.read_bytes().splitlines()) > lines):
                time.sleep(0.005)
            time.sleep(draw.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            assert process.stdout is not None
            if b"finished" in process.stdout.read():
                break
            kills += 1
            seen.add(lines)
    assert kills >= 3 and len(seen) >= 3
    assert stream(source, tmp_path / "out") and digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_command(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from hf_quant.cli import main

    model = Path(__file__).parents[2] / "examples" / "ref-llama-16m"
    if not model.is_dir():
        pytest.skip("no examples beside the tests")
    call = [
        "quantize",
        model,
        "-o",
        tmp_path / "q",
        "--method",
        "gptq",
        "--scheme",
        "W4A16-g128",
        "--dtype",
        "float32",
    ]
    few = ["--calibration-tokens", 8192, "--max-tokens", 4096, "--json"]
    text = ["--calibration", model / "heldout.txt"]
    result = CliRunner().invoke(main, [str(a) for a in (*call, *few, *text)])
    assert result.exit_code == 1 and "were calibrated on" in result.stderr
    result = CliRunner().invoke(main, [str(a) for a in (*call, *few, "--max-kl", "0.02")])
    assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["q"], "the work folder is gone"
    recipe = json.loads((tmp_path / "q" / "recipe.json").read_text())
    assert recipe["calibration"]["name"] == "calibration.txt" and recipe["calibration"]["context"] == 512
    assert len(recipe["blocks"]) == 8 and recipe["method"] == "gptq"
    assert json.loads(result.stdout)["results"][0]["quality"]["metrics"]["kl"]["value"] < 0.015
