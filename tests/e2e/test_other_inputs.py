"""Models that do not read text are refused by the command before anything is computed, with what works instead."""

from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from click.testing import CliRunner

from hf_quant import HfQuantConfig
from hf_quant.cli import main

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = SMALL | {"image_size": 28, "patch_size": 14}
MODELS: dict[str, Any] = {
    "vit": (tf.ViTModel, tf.ViTConfig(**VISION)),
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
