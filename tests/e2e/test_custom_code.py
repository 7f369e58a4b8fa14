"""A checkpoint whose configuration and class are code of its own: nobody is asked, and nothing runs unless it is trusted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from click.testing import CliRunner

from hf_quant import HfQuantConfig, load
from hf_quant.cli import main
from hf_quant.errors import CheckpointError
from hf_quant.hf.auto import config_of
from tests import yardsticks

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path({flag!r}).write_text("")
class ToyConfig(LlamaConfig):
    model_type = "toy_llm"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_toy import ToyConfig
class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder; ``ran`` beside it appears when its code is executed."""
    root = tmp_path_factory.mktemp("code")
    folder = yardsticks.make("outliers", root / "toy")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "toy_llm",
        "architectures": ["ToyForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_toy.ToyConfig",
            "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_toy.py").write_text(CONFIGURATION.format(flag=str(root / "ran")))
    (folder / "modeling_toy.py").write_text(MODELING)
    return folder


@pytest.mark.parametrize(
    "args", ["plan", "quantize -o OUT --no-eval", "quantize -o OUT --method gptq", "eval --base TOY", "bench"]
)
def test_nothing_runs_and_nobody_is_asked(toy: Path, tmp_path: Path, args: str) -> None:
    command, *rest = args.replace("OUT", str(tmp_path / "q")).replace("TOY", str(toy)).split()
    result = CliRunner().invoke(main, [command, str(toy), *rest], input="y\n" * 9)
    assert result.exit_code == 1 and "--trust-remote-code" in result.stderr, result.output
    assert not (toy.parent / "ran").exists() and not (tmp_path / "q").exists()


def test_verify_names_no_option_that_it_lacks(toy: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(toy)])
    assert result.exit_code == 1 and "verify never runs" in " ".join(result.stderr.split()), result.output
    assert "--trust-remote-code" not in result.stderr


def test_python_is_told_too(toy: Path) -> None:
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        load(str(toy), quantization_config=HfQuantConfig("W4A16-g32"))
    with pytest.raises(CheckpointError, match="no such folder here, and the Hub gives no model of that name"):
        config_of(str(toy / "nowhere"))
    assert not (toy.parent / "ran").exists()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_where_it_is_trusted_it_works(toy: Path, tmp_path: Path, method: str) -> None:
    source, out = tmp_path / "toy", tmp_path / "q"
    shutil.copytree(toy, source)
    args = [
        "quantize",
        str(source),
        "-o",
        str(out),
        "--scheme",
        "W4A16-g32",
        "--method",
        method,
        "--trust-remote-code",
    ]
    result = CliRunner().invoke(main, [*args, "--max-tokens", "1000", "-q"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert json.loads((out / "results.json").read_text())["quality"]["metrics"]["kl"]["value"] > 0
    model = load(str(out), trust_remote_code=True)
    assert type(model).__name__ == "ToyForCausalLM" and (out / "modeling_toy.py").is_file()


def test_options_of_the_hub_are_passed_on(tmp_path: Path) -> None:
    yardsticks.make("outliers", tmp_path / "parts" / "decoder")
    model: Any = load(str(tmp_path / "parts"), subfolder="decoder", quantization_config=HfQuantConfig("W8A16-g32"))
    assert isinstance(model, tf.LlamaForCausalLM) and model.dtype == torch.bfloat16
