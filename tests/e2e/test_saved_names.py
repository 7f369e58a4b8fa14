"""Models whose checkpoints name or arrange weights otherwise than their modules: what is saved loads again, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open

from hf_quant import HfQuantConfig
from hf_quant.errors import PlanError
from hf_quant.hf.saved_names import settle
from hf_quant.jobs.verify import verify

from .conftest import DECODER, IDS, SMALL, ZOO

BERT = SMALL | {"num_hidden_layers": 1, "intermediate_size": 96}
# checkpoints of other architectures: rows of several layers in one tensor (NomicBERT), shared experts whose names end like
# those of a stack (Kimi), a head with the name of a part of every layer (GIT)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "NomicBertForMaskedLM": ("NomicBertConfig", BERT),
    "KimiLinearForCausalLM": (
        "KimiLinearConfig",
        DECODER | {
            "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 32, "num_key_value_heads": 2,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "linear_key_head_dim": 16, "head_dim": 32,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "GitForCausalLM": (
        "GitConfig",
        BERT | {"vision_config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}},
    ),
}  # fmt: skip


def saved(name: str, folder: Path) -> Any:
    """A tiny model of that class, saved; its class."""
    config, sizes = MODELS[name]
    if not hasattr(tf, name):
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    torch.manual_seed(0)
    getattr(tf, name)(getattr(tf, config)(**sizes)).save_pretrained(folder)
    return getattr(tf, name)


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("format", ["auto", "native"])
@pytest.mark.parametrize("name", MODELS)
def test_saved_under_names_that_load(tmp_path: Path, name: str, format: str) -> None:
    cls = saved(name, tmp_path / "float")
    model = cls.from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig("W4A16-g32", format=format))
    got = run(model)
    model.save_pretrained(tmp_path / "out")
    again, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.hf_quantizer.plan.schemes == model.hf_quantizer.plan.schemes
    assert torch.equal(run(again), got)
    again.save_pretrained(tmp_path / "third")
    assert torch.equal(run(cls.from_pretrained(tmp_path / "third")), got)


@pytest.mark.parametrize(
    ("scheme", "other", "format"),
    [("W8A8", "W8A16-g-1", "auto"), ("W4A16-g32", "W4A16-g16", "auto"), ("W4A16-g32", "W8A16-g32", "native")],
)
def test_schemes_belong_to_layers_by_either_name(
    zoo: Any, tmp_path: Path, scheme: str, other: str, format: str
) -> None:
    """The config calls layers as the modules are called, and as the file calls them."""
    arch, folder = ZOO["llava"], zoo("llava")[1]
    config = HfQuantConfig(scheme, overrides={"*.down_proj": other}, format=format)
    model = arch.auto.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "language_model.model.layers.0.input_layernorm.weight" in set(file.keys())
    again = arch.auto.from_pretrained(tmp_path)
    assert again.hf_quantizer.plan.schemes == model.hf_quantizer.plan.schemes
    assert torch.equal(arch.run(again), arch.run(model))
    assert verify(tmp_path).layers_quantized == len(model.hf_quantizer.plan.schemes)
    named = json.dumps(json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    for prefix in ("model.language_model.layers", "language_model.model.layers"):
        assert f'"{prefix}.0.mlp.down_proj"' in named


def test_what_cannot_load_again_is_not_saved(zoo: Any) -> None:
    arch, folder = ZOO["llama"], zoo("llama")[1]
    model = arch.auto.from_pretrained(folder, quantization_config=HfQuantConfig("W4A16-g32"))
    state, name = model.state_dict(), "model.layers.0.mlp.up_proj.weight"
    lost = [tf.core_model_loading.WeightRenaming("up_proj", "gate_proj")]
    assert settle(model, state, {name}, []) == {name: name}
    with pytest.raises(PlanError, match="LlamaForCausalLM cannot be saved so that it loads again"):
        settle(model, state, {name}, lost)
