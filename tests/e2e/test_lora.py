"""PEFT on quantized models: adapters of stacked experts train, and merging into codes is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant import HfQuantConfig, prepare_for_training
from hf_quant.errors import PlanError

from .conftest import CAUSAL, IDS

peft = pytest.importorskip("peft")
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def train(model: Any, steps: int = 1) -> Any:
    """The model after some steps; every adapter has had a gradient."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in trained], 0.5)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(float(p.grad.norm()) > 0 for n, p in trained if "lora_B" in n)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_adapters_of_stacked_experts(zoo: Any, tmp_path: Path, name: str) -> None:
    def load() -> Any:
        return CAUSAL.from_pretrained(
            zoo(name)[1], dtype=torch.float32, quantization_config=HfQuantConfig("W4A16-g32")
        )

    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=STACKS)
    base = load()
    before = run(base)
    model = peft.get_peft_model(prepare_for_training(base), config).eval()
    assert (run(model) - before).abs().max() < 1e-4 * before.abs().max(), "adapters start as zero"
    after = run(train(model, steps=2))
    assert (after - before).norm() > 1e-3 * before.norm()
    with model.disable_adapter():
        assert torch.equal(run(model), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(peft.PeftModel.from_pretrained(load(), tmp_path).eval()), after)
    with torch.no_grad(), pytest.raises(PlanError, match=r"codes.*model\.dequantize\(\)"):
        model.merge_and_unload()
    twin = peft.PeftModel.from_pretrained(load().dequantize(), tmp_path).eval()
    assert (run(twin) - after).norm() < 1e-4 * after.norm()
    assert (run(twin.merge_and_unload()) - after).norm() < 1e-4 * after.norm()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_codes_is_refused_and_changes_nothing(zoo: Any, dora: bool, safe: bool) -> None:
    config = HfQuantConfig("W4A16-g32", quantize_lm_head=True, quantize_embeddings=True)
    model = CAUSAL.from_pretrained(zoo("llama")[1], dtype=torch.float32, quantization_config=config)
    lora = peft.LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head", "embed_tokens"], use_dora=dora
    )
    model = train(peft.get_peft_model(prepare_for_training(model), lora))
    after = run(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(PlanError, match=r"codes.*model\.dequantize\(\)"):
            merge(safe_merge=safe)
    assert torch.equal(run(model), after)


def test_the_share_that_is_trained(zoo: Any) -> None:
    folder, config = zoo("llama")[1], peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    shares = []
    for quantization in ({}, {"quantization_config": HfQuantConfig("W4A16-g32")}):
        model = peft.get_peft_model(CAUSAL.from_pretrained(folder, **quantization), config)
        shares.append(model.get_nb_trainable_parameters())
    assert shares[0] == shares[1]
