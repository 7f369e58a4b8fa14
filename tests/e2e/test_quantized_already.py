"""Settings for a checkpoint that is quantized already are refused: its codes would stay what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.cli import main
from hf_quant.errors import PlanError
from hf_quant.hf import refuse_requantizing
from tests.e2e.conftest import IDS

FIXTURES = Path(__file__).parents[1] / "golden" / "fixtures"
SAID = "is quantized already .*convert FOLDER --to dense"


@pytest.fixture(scope="module", params=["native", "compressed_tensors", "gptq"])
def quantized(request: pytest.FixtureRequest, zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of our own in W8, one of another program in W4."""
    if request.param == "gptq":
        return FIXTURES / "gptq-4bit"
    folder = tmp_path_factory.mktemp("quantized") / request.param
    config = HfQuantConfig("W8A16-g32", format=request.param)
    AutoModelForCausalLM.from_pretrained(zoo("llama")[1], quantization_config=config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "asked", [{"scheme": "W4A16-g128"}, {"bits": 2}, {"method": "gptq"}, {"overrides": {"*.q_proj": "W4A16-g32"}}]
)
def test_from_pretrained_ignores_no_settings(quantized: Path, asked: dict[str, Any]) -> None:
    for load in (AutoModelForCausalLM.from_pretrained, hf_quant.load):
        with pytest.raises(PlanError, match=SAID):
            load(str(quantized), quantization_config=HfQuantConfig(**asked))


@pytest.mark.filterwarnings(
    "ignore:You passed `quantization_config`:UserWarning"
)  # transformers', where it makes none
def test_what_asks_for_nothing_else_loads(quantized: Path) -> None:
    plain = hf_quant.load(str(quantized))
    stored = json.loads((quantized / "config.json").read_text())["quantization_config"]
    same = [HfQuantConfig(), plain.config.quantization_config]
    if stored["quant_method"] == "hf_quant":
        same += [HfQuantConfig.from_dict(stored)]
    if "gptq" not in stored["quant_method"]:
        left = stored.get("ignore", stored.get("modules_to_not_convert"))
        same += [HfQuantConfig("W8A16-g32"), HfQuantConfig(bits=8, group_size=32, modules_to_not_convert=left)]
        same += [HfQuantConfig("W8A16-g32", format=quantized.name)]
    with torch.no_grad():
        for config in same:
            again = AutoModelForCausalLM.from_pretrained(quantized, quantization_config=config)
            assert torch.equal(again(IDS).logits, plain(IDS).logits)


def test_data_and_activations_are_not_ignored(quantized: Path) -> None:
    native = "scheme" in json.loads((quantized / "config.json").read_text())["quantization_config"]
    asked: list[dict[str, Any]] = [{"method": "gptq", "calibration": IDS}, {"method": "learned", "epochs": 2}]
    for fields in asked:
        requested = HfQuantConfig(**fields)
        stored = HfQuantConfig(method=requested.method).to_dict() if native else {"quant_method": "gptq"}
        with pytest.raises(PlanError, match=f"{list(fields)[native]}: .*is quantized already"):
            refuse_requantizing(stored | {"share_quantized": 0.5}, requested)
    if native:
        with pytest.raises(PlanError, match="activations: it is about checkpoints of other programs"):
            hf_quant.load(str(quantized), quantization_config=HfQuantConfig(activations="int8"))


def test_a_state_dict_in_another_format_is_refused_by_its_name(quantized: Path) -> None:
    config = AutoConfig.from_pretrained(quantized)
    model = hf_quant.load(str(quantized))
    if config.quantization_config["quant_method"] == "compressed-tensors":
        with pytest.raises(PlanError, match="in the format compressed-tensors is read from its files"):
            type(model).from_pretrained(None, config=config, state_dict=model.state_dict())


def test_commands_refuse_at_once(quantized: Path, tmp_path: Path) -> None:
    for args in (
        ("quantize", quantized, "-o", tmp_path / "q", "--bits", "4", "--no-eval"),
        ("quantize", quantized, "-o", tmp_path / "q", "--method", "gptq", "--no-eval"),
        ("ladder", quantized, "-o", tmp_path / "q", "--max-kl", "1"),
        ("plan", quantized),
    ):
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        assert result.exit_code == 2 and "is quantized already" in result.stderr and not list(tmp_path.iterdir())


def test_the_advice_works(zoo: Any, tmp_path: Path) -> None:
    for name, options in (("q", ("--bits", "8")), ("again", ("--bits", "4"))):
        source = tmp_path / "float" if name == "again" else zoo("llama")[1]
        args = ("quantize", source, "-o", tmp_path / name, *options, "--group-size", "32", "--no-eval")
        assert CliRunner().invoke(main, [str(arg) for arg in args]).exit_code == 0
        args = ("convert", tmp_path / name, "--to", "dense", "-o", tmp_path / "float", "--overwrite")
        assert CliRunner().invoke(main, [str(arg) for arg in args]).exit_code == 0
    shutil.rmtree(tmp_path / "q")
    made = hf_quant.load(str(tmp_path / "again")).model.layers[0].mlp.up_proj.quantized_weight()
    assert made.scheme.bits == 4
