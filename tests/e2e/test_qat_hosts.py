"""Quantization-aware training in TRL, where it is installed; nothing of it is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quant import HfQuantConfig
from tests.yardsticks import make, text

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)  # TRL 1.16 asks for it by that name
def test_supervised_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("peaked", tmp_path / "peaked")
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HfQuantConfig("W2A16-g32-asym", training=True)
    )
    rows = [{"text": text(400 + i, 2)} for i in range(16)]
    settings = trl.SFTConfig(
        str(tmp_path / "run"), max_steps=50, per_device_train_batch_size=4, learning_rate=2e-3, logging_steps=10,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_length=64,
    )  # fmt: skip
    run = trl.SFTTrainer(
        model, args=settings, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    run.save_model(str(tmp_path / "saved"))
    monkeypatch.setenv("HF_QUANT_BACKEND", "reference")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(40, 80)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
