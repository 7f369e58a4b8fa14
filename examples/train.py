"""Quantization-aware training with Trainer: weights learn to be rounded to 2 bits, from the model in floating point.

python examples/train.py [MODEL [FOLDER [STEPS]]]      # a real training takes thousands of steps
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_quant import Distillation, HfQuantConfig

SHIPPED, LENGTH = Path(__file__).parent / "ref-llama-16m", 64
source, out, steps = (*sys.argv[1:], *(str(SHIPPED), tempfile.mkdtemp(), "4")[len(sys.argv) - 1 :])
text = (SHIPPED / "calibration.txt").read_text(encoding="utf-8")[:40_000]
ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids[0]
windows = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]

config = HfQuantConfig("W2A16-g64-asym", training=True)
student = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
teacher = AutoModelForCausalLM.from_pretrained(source)
arguments = TrainingArguments(
    f"{out}/run", learning_rate=3e-4, max_steps=int(steps), per_device_train_batch_size=2, logging_steps=1,
    save_strategy="no", report_to=[],
)  # fmt: skip
data = [{"input_ids": window, "labels": window} for window in windows]
trainer = Trainer(student, arguments, train_dataset=data, compute_loss_func=Distillation(student, teacher))
trainer.train()
trainer.save_model(f"{out}/w2")  # an ordinary quantized checkpoint
small = AutoModelForCausalLM.from_pretrained(f"{out}/w2")
print(f"{small.get_memory_footprint() / 1e6:.1f} MB in {out}/w2")
