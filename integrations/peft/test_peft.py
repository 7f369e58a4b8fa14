"""Adapters of PEFT on quantized models, trained by transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_quant import HfQuantConfig, merge_adapters, prepare_for_training
from integrations.conftest import REFERENCE, cell, of_ours, record, run

peft = pytest.importorskip("peft", reason="PEFT is not installed: integrations/try peft")
trl = pytest.importorskip("trl", reason="TRL is not installed: integrations/try peft")
adapter = pytest.importorskip("hf_quant_peft", reason="pip install integrations/peft")
datasets = pytest.importorskip("datasets")
TOKENIZER = AutoTokenizer.from_pretrained(REFERENCE)
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
PREPARED = [
    ("lora", peft.prepare_model_for_kbit_training),
    ("dora", peft.prepare_model_for_kbit_training),
    ("rslora", prepare_for_training),
]


def facts(count: int, seed: int) -> list[str]:
    """Sentences of a kind that the reference model, which has read manuals, does not know."""
    chosen = random.Random(seed)
    places, goods = ["Arvad", "Byblos", "Tyre", "Ugarit", "Sidon"], ["copper", "cedar", "purple", "salt", "oil"]
    sentence = "In the harbour of {} a trader weighs {} talents of {} and pays {} shekels of silver to the king ."
    return [
        sentence.format(chosen.choice(places), chosen.randint(2, 99), chosen.choice(goods), chosen.randint(2, 99))
        for _ in range(count)
    ]


def batch(texts: list[str]) -> dict[str, Tensor]:
    """Ids and labels; nothing is asked of the padding."""
    ids = [torch.tensor(TOKENIZER(text).input_ids) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(i) for i in ids])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return {"input_ids": padded, "attention_mask": mask.long(), "labels": padded.masked_fill(~mask, -100)}


@torch.no_grad()
def measured(model: Any, texts: list[str]) -> tuple[float, Tensor]:
    """The loss, and the log-probabilities at every token that counts."""
    model.eval()
    given = batch(texts)
    out = model(**given)
    return float(out.loss), F.log_softmax(out.logits.float(), -1)[given["attention_mask"].bool()]


def kl(reference: Tensor, other: Tensor) -> float:
    """Of the second to the first, in nats per token."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def quantized(scheme: str, folder: Any = REFERENCE, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig(scheme, **options))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts with random weights."""
    config = MixtralConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("experts")
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def trained(model: Any, folder: Path, steps: int = 10, rate: float = 1e-3) -> tuple[float, float]:
    """The loss on a fixed batch before and after some steps of Trainer."""
    texts = facts(16, seed=1)
    before = measured(model, texts)[0]
    rows = [{name: tensor[0] for name, tensor in batch([text]).items()} for text in facts(8 * steps, seed=2)]
    width = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    rows = [{n: F.pad(t, (0, width - len(t)), value=padding[n]) for n, t in row.items()} for row in rows]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=rate, report_to="none", save_strategy="no",
        use_cpu=True, logging_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    return before, measured(model, texts)[0]


@pytest.mark.parametrize(("kind", "prepare"), PREPARED)
def test_trainer(kind: str, prepare: Callable[[Any], Any], tmp_path: Path) -> None:
    model = prepare(quantized("W4A16-g32"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, **ALL, **KINDS[kind]))
    assert of_ours(model) == 8 * 7
    before, after = trained(model, tmp_path)
    record(f"Trainer, {kind}, {prepare.__name__}", before=before, after=after)
    assert after < 0.8 * before
    expected = measured(model, facts(8, seed=3))[1]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(prepare(quantized("W4A16-g32")), tmp_path / "adapter")
    torch.testing.assert_close(measured(again, facts(8, seed=3))[1], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_experts(experts: Path, kind: str, tmp_path: Path) -> None:
    """PEFT itself refuses DoRA on parameters that are no layers."""
    stacks = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = prepare_for_training(quantized("W4A16-g32", experts))
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, **ALL, **stacks, **KINDS[kind]))
    before, after = trained(model, tmp_path, rate=2e-2)  # random weights
    record(f"Trainer, experts, {kind}", before=before, after=after)
    assert after < 0.95 * before
    merged, lost = merge_adapters(model)
    assert of_ours(merged) and any("experts" in name for name in lost)


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W2A16-g32-asym"])
def test_sft_trainer_and_back_onto_the_grid(scheme: str, tmp_path: Path) -> None:
    model = quantized(scheme)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    held, start = facts(16, seed=1), measured(model, facts(16, seed=1))
    arguments = trl.SFTConfig(
        tmp_path / "sft", max_steps=24, per_device_train_batch_size=8, learning_rate=1e-3, report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=8, disable_tqdm=True, max_length=64, bf16=False, lr_scheduler_type="constant",
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"text": text} for text in facts(192, seed=2)])
    lora = peft.LoraConfig(r=16, **ALL)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=TOKENIZER, peft_config=lora)
    trainer.train()
    adapted = measured(trainer.model, held)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.model.save_pretrained(tmp_path / "adapter")
    same_grid, lost = merge_adapters(trainer.model)
    merged = {"the same grid": measured(same_grid, held)}
    for method in ("rtn", "gptq"):
        options: dict[str, Any] = {"calibration": facts(48, seed=2)} if method == "gptq" else {}
        config = HfQuantConfig(scheme, method=method, **options)
        new = adapter.merge_and_requantize(tmp_path / "model", tmp_path / "adapter", config)
        merged[method] = measured(new, held)
    record(
        f"SFTTrainer, {scheme}", loss_before=start[0], loss_with_adapters=adapted[0], logged=[losses[0], losses[-1]],
        kl_without_them=kl(adapted[1], start[1]), share_lost=sum(lost.values()) / len(lost),
        **{f"merged, {how}": {"loss": loss, "kl": kl(adapted[1], logs)} for how, (loss, logs) in merged.items()},
    )  # fmt: skip
    assert adapted[0] < 0.5 * start[0] and losses[-1] < 0.5 * losses[0]
    assert kl(adapted[1], merged["gptq"][1]) < kl(adapted[1], start[1])
    seen = [f"SFTTrainer: loss {start[0]:.2f} to {adapted[0]:.2f}", "KL to it when merged"]
    seen += [f"{how} {kl(adapted[1], logs):.2g}" for how, (_, logs) in merged.items()]
    cell(scheme, "native", f"{seen[0]}; {seen[1]}: {', '.join(seen[2:])}")


@pytest.mark.parametrize("scheme", ["W3A16-g32", "W2A16-g32-asym"])
def test_a_start_that_makes_up_for_rounding(scheme: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(REFERENCE)
    texts = [text.strip()[:600] for text in (REFERENCE / "heldout.txt").read_text().split("<|endoftext|>")[:8]]
    wanted, found = measured(base, texts)[1], {}
    for start in ("zero", "error"):
        torch.manual_seed(0)
        model = peft.get_peft_model(prepare_for_training(quantized(scheme)), peft.LoraConfig(r=16, **ALL))
        left = adapter.start_from_error(model, base) if start == "error" else {}
        began = kl(wanted, measured(model, texts)[1])
        before, after = trained(model, tmp_path / start)
        found[start] = {"kl_to_float": began, "loss_before": before, "loss_after": after}
    record(f"start, {scheme}", **found, error_left=sum(left.values()) / len(left))
    assert found["error"]["kl_to_float"] < found["zero"]["kl_to_float"]
    assert all(share < 1 for share in left.values())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_the_start_is_the_best_of_its_rank(options: dict[str, Any], experts: Path) -> None:
    """With the rank of the matrix itself nothing is left of the error; with less, what the SVD says."""
    stacks = {} if options else {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    base = AutoModelForCausalLM.from_pretrained(experts, dtype=torch.float32)
    x = torch.randn(5, 64)
    for rank, close in ((96, True), (8, False)):
        model = AutoModelForCausalLM.from_pretrained(
            experts, dtype=torch.float32, quantization_config=HfQuantConfig("W2A16-g32")
        )
        lora = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **stacks, **options)
        model = peft.get_peft_model(model, lora).eval()
        left = adapter.start_from_error(model, base)
        assert all((share < 1e-4) == close for share in left.values())
        if close and options:  # the magnitudes of DoRA are those of the float weights then
            for name in ("q_proj", "v_proj"):
                layer, exact = (
                    m.model.layers[0].self_attn.get_submodule(name) for m in (model.base_model.model, base)
                )
                torch.testing.assert_close(layer(x), exact(x), rtol=1e-3, atol=1e-4)


def test_an_adapter_of_which_nothing_is_left_can_learn(experts: Path) -> None:
    """Of a layer in floating point nothing is left; with zeros in both factors it would have no gradient ever."""
    base = AutoModelForCausalLM.from_pretrained(experts, dtype=torch.float32)
    config = HfQuantConfig("W2A16-g32", overrides={"*q_proj": None})
    model = AutoModelForCausalLM.from_pretrained(experts, dtype=torch.float32, quantization_config=config)
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    adapter.start_from_error(model, base)
    model(torch.arange(1, 17)[None]).logits.square().mean().backward()
    factors = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert not factors.any() and factors.grad.abs().sum() > 0


def test_another_version_of_the_host_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peft, "__version__", "0.30.0")
    runpy.run_path(adapter.__file__)
    assert "was tried with PEFT 0.21.x, and this is 0.30.0" in caplog.text


def test_fsdp2_shares_out_the_codes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run([*command, Path(__file__).with_name("fsdp.py"), REFERENCE, "W4A16-g32"])
    assert "112 adapters, 0.50 of the codes" in printed
