"""Models that do not read text are refused by the command before anything is computed, with what works instead."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from safetensors.torch import save_file

from hf_quant import HfQuantConfig
from hf_quant.cli import main
from hf_quant.data.batches import read_batches
from tests.architectures import differing

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = SMALL | {"image_size": 28, "patch_size": 14}
MODELS: dict[str, Any] = {
    "vit": (tf.ViTModel, tf.ViTConfig(**VISION)),
    "vit_mae": (tf.ViTMAEModel, tf.ViTMAEConfig(**SMALL, image_size=28, patch_size=7)),
    "clip": (tf.CLIPModel, tf.CLIPConfig(text_config=SMALL | {"vocab_size": 64}, vision_config=VISION)),
}


@pytest.mark.parametrize("name", MODELS)
def test_refused_at_once_and_quantized_in_python(name: str, tmp_path: Path) -> None:
    kind, config = MODELS[name]
    kind(config).save_pretrained(tmp_path / name)
    args = ["quantize", str(tmp_path / name), "-o", str(tmp_path / "q"), "--scheme", "W4A16-g32", "--no-eval"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and "in Python, from_pretrained" in result.stderr, result.output
    assert [path.name for path in tmp_path.iterdir()] == [name]
    model = kind.from_pretrained(tmp_path / name, quantization_config=HfQuantConfig("W4A16-g32"))
    model.save_pretrained(tmp_path / "saved")
    assert kind.from_pretrained(tmp_path / "saved").hf_quantizer is not None


def test_rounded_and_measured_by_the_command_though_it_draws_random_masks(tmp_path: Path) -> None:
    kind, config = MODELS["vit_mae"]
    kind(config).save_pretrained(tmp_path / "mae")
    save_file({"pixel_values": torch.randn(3, 3, 28, 28)}, tmp_path / "inputs.safetensors")
    args = ["quantize", str(tmp_path / "mae"), "-o", str(tmp_path / "q"), "--scheme", "W8A16-g32", "--inputs"]
    result = CliRunner().invoke(main, [*args, str(tmp_path / "inputs.safetensors")])
    assert result.exit_code == 0 and "no interval: there are 3 samples" in result.output, result.output


def test_calibrated_by_the_command_on_inputs_from_a_file(tmp_path: Path) -> None:
    kind, config = MODELS["vit"]
    kind(config).save_pretrained(tmp_path / "vit")
    torch.manual_seed(0)
    save_file({"pixel_values": torch.randn(6, 3, 28, 28)}, tmp_path / "inputs.safetensors")
    args = [
        "quantize",
        str(tmp_path / "vit"),
        "-o",
        str(tmp_path / "q"),
        "--scheme",
        "W4A16-g32",
        "--method",
        "calibrated",
    ]
    result = CliRunner().invoke(main, [*args, "--calibration", str(tmp_path / "inputs.safetensors")])
    assert result.exit_code == 0, result.output
    batches = read_batches(tmp_path / "inputs.safetensors")
    ours = HfQuantConfig("W4A16-g32", method="calibrated", calibration=iter(batches))
    assert not differing(
        kind.from_pretrained(tmp_path / "vit", quantization_config=ours), kind.from_pretrained(tmp_path / "q")
    )
