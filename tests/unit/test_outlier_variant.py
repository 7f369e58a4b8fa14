"""The model that benchmarks/outlier_variant.py makes: the same function, with strong input channels."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "outlier_variant.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no benchmarks beside the tests")


def test_same_logits_from_stronger_channels(tmp_path: Path) -> None:
    make = runpy.run_path(str(SCRIPT))["make"]
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in base.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for name in ("one", "two"):
        make(tmp_path / "base", tmp_path / name, share=0.05)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert made.dtype == torch.float32

    ids = torch.randint(64, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)

    for layer, original in zip(made.model.layers, base.model.layers, strict=True):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            ratio = getattr(layer, norm).weight / getattr(original, norm).weight
            assert (ratio != 1).sum() == 7  # 5 % of 128, rounded up
            torch.testing.assert_close(ratio[ratio != 1], torch.full((7,), 30.0))
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
