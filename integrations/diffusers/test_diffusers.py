"""Models and pipelines of diffusers, quantized while they load, saved and loaded again."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_quant import HfQuantError, QuantLinear
from integrations.conftest import cell, record

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: integrations/try diffusers")
adapter = pytest.importorskip("hf_quant_diffusers", reason="pip install integrations/diffusers")
Config = adapter.HfQuantDiffusersConfig
DIT = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2,
    "num_embeds_ada_norm": 10,
}  # fmt: skip
UNET = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8, "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
}  # fmt: skip


@pytest.fixture(params=["DiTTransformer2DModel", "UNet2DConditionModel"])
def kind(request: Any) -> Any:
    return getattr(diffusers, request.param)


@pytest.fixture
def folder(kind: Any, tmp_path: Path) -> Path:
    kind(**(DIT if kind.__name__.startswith("DiT") else UNET)).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    sample, step = torch.randn(2, 4, 8, 8), torch.tensor([3, 5])
    if type(model).__name__.startswith("DiT"):
        return model.eval()(sample, timestep=step, class_labels=torch.tensor([1, 2])).sample
    return model.eval()(sample, step, encoder_hidden_states=torch.randn(2, 7, 32)).sample


def quantized(model: nn.Module) -> int:
    return sum(isinstance(module, QuantLinear) for module in model.modules())


@pytest.mark.parametrize("scheme", ["W8A16-g64", "W4A16-g64-asym", "W3A16-g32"])
def test_a_model(kind: Any, folder: Path, scheme: str, tmp_path: Path) -> None:
    base = kind.from_pretrained(folder)
    model = kind.from_pretrained(folder, quantization_config=Config(scheme))
    wanted, got = output(base), output(model)
    linear = sum(type(module) is nn.Linear and module.in_features % 32 == 0 for module in base.modules())
    assert quantized(model) == linear > 8
    error = float((got - wanted).norm() / wanted.norm())
    record(f"{kind.__name__}, {scheme}", layers=linear, error=error)
    assert error < {"8": 0.02, "4": 0.3, "3": 0.6}[scheme[1]]
    model.save_pretrained(tmp_path / "q")
    again = kind.from_pretrained(tmp_path / "q")
    assert quantized(again) == linear
    assert torch.equal(output(again), got)
    dense = again.dequantize()
    assert quantized(dense) == 0
    torch.testing.assert_close(output(dense), got, rtol=1e-3, atol=1e-3)
    name = kind.__name__.partition("2D")[0].removesuffix("Transformer")
    cell(scheme, "native", f"{name} {100 * error:.2g} % error")


def test_a_pipeline(tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4)
    parts = {
        "transformer": diffusers.DiTTransformer2DModel(**(DIT | {"num_embeds_ada_norm": 1000, "out_channels": 8})),
        "vae": vae,
        "scheduler": diffusers.DDIMScheduler(),
    }
    diffusers.DiTPipeline(**parts).save_pretrained(tmp_path / "float")
    plan = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": Config("W4A16-g64")})
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "float", quantization_config=plan)
    assert quantized(pipeline.transformer) > 8
    assert quantized(pipeline.vae) == 0
    pipeline.save_pretrained(tmp_path / "q")
    images = []
    for made in (pipeline, diffusers.DiTPipeline.from_pretrained(tmp_path / "q")):
        generator = torch.Generator().manual_seed(0)
        images.append(made([1], num_inference_steps=2, generator=generator, output_type="np").images)
    assert (images[0] == images[1]).all()


def test_another_version_of_the_host_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(diffusers, "__version__", "0.50.0")
    for name in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):  # a second run registers anew
        monkeypatch.setattr(diffusers.quantizers.auto, name, {})
    runpy.run_path(adapter.__file__)
    assert "was tried with diffusers 0.42.x, and this is 0.50.0" in caplog.text


def test_globs_that_match_nothing_are_named(kind: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Config(
        "W8A16-g64", overrides={"no.*": "W4A16-g64", "*": "W8A16-g32"}, modules_to_not_convert=["*.nowhere"]
    )
    kind.from_pretrained(folder, quantization_config=config)
    lines = [line for line in caplog.messages if "matches no linear layer" in line]
    assert len(lines) == 2 and "'no.*'" in lines[0] and "'*.nowhere'" in lines[1]


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(HfQuantError, match="looks at inputs"):
        Config("W4A16-g64", method="gptq")
    with pytest.raises(HfQuantError, match="not a scheme"):
        Config("W5A16")
