"""Every kind of adapter on every kind of quantized module: trained, saved, loaded again and merged onto the grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from hf_quant import HfQuantConfig, merge_adapters, prepare_for_training
from integrations.conftest import REFERENCE, record

peft = pytest.importorskip("peft", reason="PEFT is not installed: integrations/try peft")
adapter = pytest.importorskip("hf_quant_peft", reason="pip install integrations/peft")
CAUSAL: Any = tf.AutoModelForCausalLM
TOKENIZER = tf.AutoTokenizer.from_pretrained(REFERENCE)
IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
GATED = SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "initializer_range": 0.2}
STACKS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
TABLES = {"quantize_embeddings": True, "quantize_lm_head": True}
# a module's kind: a model that has it, further fields of HfQuantConfig, and where its adapters go
MODULES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "linear": (tf.LlamaConfig(**GATED), {}, {"target_modules": "all-linear"}),
    "embeddings and head": (tf.LlamaConfig(**GATED), TABLES, {"target_modules": ["embed_tokens", "lm_head"]}),
    "Conv1D": (tf.GPT2Config(**SMALL, n_positions=64), {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "experts": (tf.MixtralConfig(**GATED, num_local_experts=4), {}, STACKS),
    "transposed experts": (tf.GptOssConfig(**GATED, head_dim=32, num_local_experts=4), {}, STACKS),
}
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def trained(model: Any, steps: int = 6) -> list[float]:
    """The loss before each step; every factor that starts as zero has had a gradient."""
    found, parameters = [], [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in parameters], 1e-2)
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(float(p.grad.norm()) > 0 for n, p in parameters if "lora_B" in n or "lora_embedding_A" in n)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", MODULES)
def test_every_kind_on_every_module(module: str, kind: str, tmp_path: Path) -> None:
    config, fields, where = MODULES[module]
    CAUSAL.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **where, **KINDS[kind])

    def load() -> Any:
        quantized = HfQuantConfig("W4A16-g32", **fields)
        return CAUSAL.from_pretrained(tmp_path / "base", dtype=torch.float32, quantization_config=quantized)

    if "experts" in module and kind == "dora":
        with pytest.raises(ValueError, match="does not work with use_dora"):
            peft.get_peft_model(load(), lora)
        return
    model = peft.get_peft_model(prepare_for_training(load()), lora)
    losses = trained(model)
    assert losses[-1] < losses[0]
    after = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    load().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    finer = HfQuantConfig("W8A16-g32", **fields)
    anew = adapter.merge_and_requantize(tmp_path / "model", tmp_path / "adapter", finer)
    assert (logits(anew).float() - after).norm() < 0.05 * after.norm()
    merged, lost = merge_adapters(again)
    record(f"{kind} on {module}", loss=[losses[0], losses[-1]], share_lost=sum(lost.values()) / len(lost))
    assert lost and all(0 < share < 1 for share in lost.values())
    assert (logits(merged) - after).norm() < (logits(load()) - after).norm()


def test_merging_needs_no_tokenizer_and_looks_for_adapters_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = HfQuantConfig("W4A16-g32")
    CAUSAL.from_config(tf.LlamaConfig(**GATED)).save_pretrained(tmp_path / "base")
    model = CAUSAL.from_pretrained(tmp_path / "base", quantization_config=config)
    model.save_pretrained(tmp_path / "model")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    adapter.merge_and_requantize(tmp_path / "model", tmp_path / "adapter", config)
    monkeypatch.setattr(adapter.hf_quant, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="adapter_config"):
        adapter.merge_and_requantize(tmp_path / "model", tmp_path / "base", config)
