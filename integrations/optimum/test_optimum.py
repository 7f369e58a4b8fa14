"""The real ``optimum-cli``, and the adapter."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quant import HfQuantConfig
from integrations.conftest import REFERENCE, Saved, cell, of_ours, run, written

pytest.importorskip("optimum.quantization_base", reason="optimum is not installed: integrations/try optimum")
adapter = pytest.importorskip("hf_quant_optimum", reason="pip install integrations/optimum")
CLI = str(shutil.which("optimum-cli", path=str(Path(sys.executable).parent)))


def test_it_is_listed_and_costs_nothing_until_it_runs() -> None:
    assert "hf-quant" in run([CLI, "--help"])
    assert "--max-kl" in run([CLI, "hf-quant", "quantize", "--help"])
    code = "import sys, optimum.commands.register.register_hf_quant; print('torch' in sys.modules, 'hf_quant' in sys.modules)"
    assert run([sys.executable, "-c", code]).split() == ["False", "False"]


def test_it_writes_what_hf_quant_writes(saved: Saved, tmp_path: Path) -> None:
    run([CLI, "hf-quant", "quantize", REFERENCE, "-o", tmp_path / "q", "--scheme", "W4A16-g128", "--no-eval"])
    expected = saved("W4A16-g128", "compressed-tensors")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "q" / name).read_bytes() == (expected / name).read_bytes()
    cell("W4A16-g128", "compressed-tensors", "`optimum-cli` writes the same bytes")


def test_it_fails_as_hf_quant_fails(tmp_path: Path) -> None:
    command: list[str | Path] = [CLI, "hf-quant", "quantize", REFERENCE, "-o", tmp_path / "q", "--scheme", "W5A16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "W5A16" in done.stderr and not (tmp_path / "q").exists()


def test_the_quantizer(tmp_path: Path) -> None:
    quantizer = adapter.HfQuantizer.from_pretrained(REFERENCE)
    quantizer.quantize(tmp_path / "q", scheme="W3A16-g32", overrides={"*.down_proj": "W8A16-g32"})
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "q"), torch.arange(1, 17)[None]
    config = HfQuantConfig("W3A16-g32", overrides={"*.down_proj": "W8A16-g32"})
    direct = AutoModelForCausalLM.from_pretrained(REFERENCE, quantization_config=config)
    assert of_ours(model) == 8 * 7
    assert torch.equal(model(ids).logits, direct(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "q")("a cell object").input_ids
    with pytest.raises(ValueError, match="not empty"):
        quantizer.quantize(tmp_path / "q")
    cell("W3A16-g32, W8A16-g32", written(tmp_path / "q"), "`HfQuantizer` writes, same logits")


def test_another_version_of_the_host_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.0")
    runpy.run_path(adapter.__file__)
    assert "was tried with optimum 2.3.x, and this is 2.9.0" in caplog.text


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the folder of the model"):
        adapter.HfQuantizer.from_pretrained(REFERENCE, file_name="model.safetensors")
    quantizer = adapter.HfQuantizer.from_pretrained(REFERENCE)
    with pytest.raises(ValueError, match="would not be found on loading"):
        quantizer.quantize(tmp_path / "q", file_prefix="mine")
    with pytest.raises(ValueError, match="did you mean bits"):
        quantizer.quantize(tmp_path / "q", wbits=4)
    assert not (tmp_path / "q").exists()
