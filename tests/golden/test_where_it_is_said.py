"""Where other programs say that a checkpoint is quantized: not always under ``quantization_config``."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_quant
from hf_quant.errors import CheckpointError
from hf_quant.jobs.verify import verify

FIXTURES = Path(__file__).parent / "fixtures"
IDS = torch.arange(3, 19)[None]


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    made: torch.Tensor = hf_quant.load(str(folder)).eval()(input_ids=IDS).logits
    return made


def moved(fixture: str, folder: Path, to: str) -> Path:
    """The fixture, with what it says of its quantization elsewhere: a field of config.json, a file, or nowhere."""
    shutil.copytree(FIXTURES / fixture, folder)
    for name in ("quantize_config.json", "quant_config.json"):
        (folder / name).unlink(missing_ok=True)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    stored = config.pop("quantization_config")
    if to.endswith(".json"):
        (folder / to).write_text(json.dumps({k: v for k, v in stored.items() if k != "quant_method"}))
    elif to:
        config[to] = stored
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("fixture", "to"),
    [
        ("gptq-4bit", "quantize_config.json"),
        ("gptq-4bit-asym", "quantize_config.json"),
        ("awq-gemm", "quant_config.json"),
        ("ct-4bit", "compression_config"),
        ("ct-w8a8", "compression_config"),
    ],
)
def test_elsewhere(tmp_path: Path, fixture: str, to: str) -> None:
    folder = moved(fixture, tmp_path / "moved", to)
    assert torch.equal(logits(folder), logits(FIXTURES / fixture))
    assert verify(folder).layers_quantized > 0


@pytest.mark.parametrize("fixture", ["gptq-4bit", "awq-gemm", "ct-4bit", "ct-w8a8", "bnb-nf4", "hqq-4bit"])
def test_nowhere(tmp_path: Path, fixture: str) -> None:
    folder = moved(fixture, tmp_path / "moved", "")
    for check in (lambda: hf_quant.load(str(folder)), lambda: verify(folder)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .*quantization_config"):
            check()
