"""Every weight is quantized or listed with its reason; what stays in floating point, or is tied, works."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_quant import HfQuantConfig
from hf_quant.hf import make_plan
from hf_quant.hf.candidates import why_not_plain
from hf_quant.nn import QuantExperts, QuantLinear

from .conftest import DECODER, IDS, MOE, SMALL

VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
T5 = {"vocab_size": 256, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}  # fmt: skip
BERT = SMALL | {"intermediate_size": 96}
KINDS: dict[str, tuple[Any, Any]] = {
    "stacks of its own kind": (tf.JetMoeForCausalLM, tf.JetMoeConfig(**DECODER, num_local_experts=4, kv_channels=32)),
    "linear layers of its own kind": (tf.FalconForCausalLM, tf.FalconConfig(**SMALL)),
    "convolutions and parameters": (tf.MambaForCausalLM, tf.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=1)),
    "no input embeddings": (tf.ConvNextForImageClassification, tf.ConvNextConfig(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2)),
    "two towers": (tf.CLIPModel, tf.CLIPConfig(text_config=dict(BERT), vision_config=VISION)),
    "tables of positions": (tf.BertForMaskedLM, tf.BertConfig(**BERT)),
    "routers": (tf.MixtralForCausalLM, tf.MixtralConfig(**MOE, num_local_experts=4)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_names_every_weight(kind: str) -> None:
    cls, config = KINDS[kind]
    with torch.device("meta"):
        model = cls(config)
    plan = make_plan(model, HfQuantConfig("W4A16-g32"))
    named = plan.schemes.keys() | plan.left.keys() | plan.others.keys()
    weights = [n for n, p in model.named_parameters() if p.ndim >= 2 and min(p.shape[-2:]) > 1]
    assert weights and all({name, name.rpartition(".")[0]} & named for name in weights)
    assert not plan.others.keys() & (plan.schemes.keys() | plan.left.keys())
    assert all(reason in plan.summary() for reason in plan.others.values())


@pytest.mark.parametrize("format", ["auto", "native"])
@pytest.mark.parametrize("overrides", [{}, {"*.wo": "W8A16-g32"}])
def test_what_a_model_keeps_in_float32_is_loaded_so(tmp_path: Path, format: str, overrides: dict[str, str]) -> None:
    """T5's ``wo``, whose outputs are more than float16 holds: it was so after quantizing, and not after loading the result."""
    tf.T5ForConditionalGeneration(tf.T5Config(**T5)).save_pretrained(tmp_path / "base")
    config = HfQuantConfig("W4A16-g32", overrides=overrides, format=format)
    model = tf.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "base", dtype=torch.float16, quantization_config=config
    )
    model.save_pretrained(tmp_path / "q")
    again = tf.T5ForConditionalGeneration.from_pretrained(tmp_path / "q")
    dtypes = [{name: tensor.dtype for name, tensor in one.state_dict().items()} for one in (model, again)]
    assert dtypes[0] == dtypes[1] and torch.equal(run(again), run(model))
    wo = again.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wo, QuantLinear) == bool(overrides) and (overrides or wo.weight.dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_layers_of_its_own_kind_are_quantized_in_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """What a class computes was compared in the dtype of the model, where a bias that is added apart is another number."""
    cls, config = KINDS["linear layers of its own kind"]
    why_not_plain.cache_clear()
    cls(config).to(dtype).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base", quantization_config=HfQuantConfig("W3A16-g32"))
    assert model.dtype == dtype and isinstance(model.transformer.h[0].mlp.dense_4h_to_h, QuantLinear)
    model.save_pretrained(tmp_path / "q")
    why_not_plain.cache_clear()
    again = cls.from_pretrained(tmp_path / "q")
    assert isinstance(again.transformer.h[0].mlp.dense_4h_to_h, QuantLinear)
    assert torch.equal(run(again), run(model))


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    logits: torch.Tensor = model.eval()(input_ids=IDS, **extra).logits
    return logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "asked",
    [
        {"overrides": {"*.experts.down_proj": None}},
        {"modules_to_not_convert": ["model.layers.0.mlp"]},
        {},  # a width of 80 cannot be quantized
    ],
)
def test_stacks_that_stay_in_floating_point(tmp_path: Path, asked: dict[str, Any]) -> None:
    """Of a checkpoint that holds the experts apart."""
    torch.manual_seed(0)
    width = 64 if asked else 80
    base = tf.MixtralForCausalLM(tf.MixtralConfig(**MOE | {"intermediate_size": width}, num_local_experts=4))
    base.save_pretrained(tmp_path / "float")
    model = tf.MixtralForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=HfQuantConfig("W8A16-g32", **asked)
    )
    stacks = {n: p for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))}
    dense = {name: stack for name, stack in stacks.items() if stack.is_floating_point()}
    assert dense and len(dense) < len(stacks) and any(isinstance(m, QuantExperts) for m in model.modules())
    assert all(torch.equal(stack, base.get_parameter(name)) for name, stack in dense.items())
    got = run(model)
    assert apart(got, run(base)) < 0.05
    model.save_pretrained(tmp_path / "codes")
    assert torch.equal(run(tf.MixtralForCausalLM.from_pretrained(tmp_path / "codes")), got)
    assert apart(run(model.dequantize()), got) < 1e-4


@pytest.mark.parametrize("asked", ["quantize_lm_head", "quantize_embeddings"])
@pytest.mark.parametrize(
    ("cls", "config", "tied"),
    [
        (tf.BertForMaskedLM, tf.BertConfig(**BERT), True),  # its bias is tied too
        (tf.T5ForConditionalGeneration, tf.T5Config(**T5), False),  # four modules are one table, two of them no candidates
    ],
)  # fmt: skip
def test_heads_that_are_tied(tmp_path: Path, cls: Any, config: Any, tied: bool, asked: str) -> None:
    torch.manual_seed(0)
    base = cls(config)
    base.save_pretrained(tmp_path / "float")
    model = cls.from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig("W8A16-g32", **{asked: True}))
    plan = model.hf_quantizer.plan
    assert plan.tied is tied
    assert tied or any(reason.startswith("tied to") for reason in plan.left.values())
    got = run(model)
    assert apart(got, run(base)) < 0.05
    model.save_pretrained(tmp_path / "codes")
    assert torch.equal(run(cls.from_pretrained(tmp_path / "codes")), got)
