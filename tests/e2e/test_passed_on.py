"""Other programs pass on what a checkpoint says itself; that does not hand it to another implementation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import CompressedTensorsConfig
from transformers.quantizers.auto import AutoQuantizationConfig

import hf_quant
from hf_quant import HfQuantConfig, take_over
from hf_quant.cli import main
from hf_quant.nn import QuantLinear

from .conftest import CAUSAL, IDS

GPTQ = Path(__file__).parents[1] / "golden" / "fixtures" / "gptq-4bit"


@pytest.fixture(scope="module")
def native(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "model"
    config = HfQuantConfig("W4A16-g32-asym", format="native")
    CAUSAL.from_pretrained(zoo("llama")[1], quantization_config=config).save_pretrained(folder)
    return folder


def passed_on(folder: Path) -> Any:
    """As lm-evaluation-harness does it."""
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    return CAUSAL.from_pretrained(folder, quantization_config=AutoQuantizationConfig.from_dict(stored))


@pytest.mark.parametrize(
    ("to", "package"), [("compressed-tensors", True), ("compressed-tensors", False), ("gptq", True), ("awq", True)]
)
def test_what_we_wrote_runs_here(
    native: Path, tmp_path: Path, to: str, package: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CliRunner().invoke(main, ["convert", str(native), "--to", to, "-o", str(tmp_path / to)]).exit_code == 0
    if not package:
        module = sys.modules["transformers.utils.quantization_config"]
        monkeypatch.setattr(module, "is_compressed_tensors_available", lambda: False)
    expected = hf_quant.load(str(native))(IDS).logits
    for model in (passed_on(tmp_path / to), CAUSAL.from_pretrained(tmp_path / to)):
        assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
        assert torch.equal(model(IDS).logits, expected)


def test_what_others_wrote_runs_here_where_that_was_asked_for() -> None:
    take_over("gptq")
    try:
        assert isinstance(passed_on(GPTQ).model.layers[0].mlp.up_proj, QuantLinear)
    finally:
        take_over()


def test_whoever_asks_for_something_else_gets_it(native: Path, tmp_path: Path) -> None:
    args = ["convert", str(native), "--to", "compressed-tensors", "-o", str(tmp_path / "ct")]
    assert CliRunner().invoke(main, args).exit_code == 0
    with pytest.warns(UserWarning, match="loading attributes"):
        model = CAUSAL.from_pretrained(tmp_path / "ct", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
