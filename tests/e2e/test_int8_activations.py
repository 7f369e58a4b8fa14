"""INT8 activations through transformers: asked for, saved as compressed-tensors, read back, and read by that package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_quant import HfQuantConfig, load
from hf_quant.errors import HfQuantError
from hf_quant.nn import QuantLinear

UP = "model.layers.0.mlp.up_proj"
IDS = torch.arange(1, 17)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(IDS).logits.float()
    return made


def quantized(folder: Path, slug: str, **how: Any) -> Any:
    config = HfQuantConfig(slug, **how)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def calibrated(folder: Path, slug: str, method: str = "calibrated", **options: Any) -> Any:
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    return quantized(folder, slug, method=method, calibration=ids, **options)


@pytest.mark.parametrize("slug", ["W8A8", "W8A8-threshold", "W4A8-g32"])
def test_from_pretrained_and_back(zoo: Any, tmp_path: Path, slug: str) -> None:
    _, folder = zoo("llama")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = quantized(folder, slug)
    far = (logits(model) - logits(base)).norm() / logits(base).norm()
    assert 0 < far < (0.05 if "W8" in slug else 0.3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))
    assert str(again.get_submodule(UP).scheme).startswith(slug.split("-")[0])


@pytest.mark.parametrize("slug", ["W8A8", "W8A8-static", "W8A8-o5%-columns", "W4A8-g32"])
def test_calibrated_and_back(zoo: Any, tmp_path: Path, slug: str) -> None:
    model = calibrated(zoo("llama")[1], slug)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(str(tmp_path), dtype=torch.float32)), logits(model))


@pytest.mark.parametrize("static", [False, True])
def test_the_package_reads_ours_with_identical_weights(zoo: Any, tmp_path: Path, static: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = calibrated(zoo("llama")[1], "W8A8-static" if static else "W8A8", "smoothquant+gptq")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = QuantizationConfig.model_validate(stored).config_groups["group_0"]
    inputs = group.input_activations
    assert inputs.num_bits == 8 and inputs.type == "int" and inputs.symmetric and inputs.dynamic is not static
    assert inputs.strategy == ("tensor" if static else "token")
    tensors = load_file(tmp_path / "model.safetensors")
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            assert ("input_scale" in own) is static
            made = BaseCompressor.get_value_from_registry("int-quantized").decompress(own, group)
            assert torch.equal(made["weight"].float(), module.dequantize(made["weight"].dtype).float())
            found += 1
    assert found == 14


def test_calibrated_leaves_the_inputs_of_down_proj_alone_unless_asked(zoo: Any, tmp_path: Path) -> None:
    model = calibrated(zoo("llama")[1], "W8A8")
    schemes = {name: str(scheme) for name, scheme in model.hf_quantizer.plan.schemes.items()}
    assert {name for name, slug in schemes.items() if slug != "W8A8"} == {
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    }
    assert schemes["model.layers.0.mlp.down_proj"] == "W8A16-g-1"
    said = (
        "activations in floating point, where INT8 costs most; an override asks for INT8: model.layers.0.mlp.down_proj"
    )
    assert said in model.hf_quantizer.plan.summary()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(str(tmp_path), dtype=torch.float32)), logits(model))
    asked = calibrated(zoo("llama")[1], "W8A8", overrides={"*.down_proj": "W8A8"})
    assert set(map(str, asked.hf_quantizer.plan.schemes.values())) == {"W8A8"}


def test_static_ranges_without_calibration_are_refused(zoo: Any) -> None:
    with pytest.raises(HfQuantError, match="the range of the activations must be found by calibration"):
        quantized(zoo("llama")[1], "W8A8-static")


def test_activations_that_are_not_numbers_name_the_layer(zoo: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo("llama")[1], dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 3e38
        model.model.layers[1].input_layernorm.weight[4] = 3e38
        model.model.embed_tokens.weight *= 1e3
    model.save_pretrained(tmp_path)
    with pytest.raises(HfQuantError, match=r"model\.layers\.[01]"):
        calibrated(tmp_path, "W8A8")
