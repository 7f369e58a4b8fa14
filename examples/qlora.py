"""QLoRA: adapters in floating point on a model in 4 bits. Needs peft.

python examples/qlora.py [MODEL [FOLDER [STEPS]]]
"""

import sys
import tempfile
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_quant import HfQuantConfig, prepare_for_training

LENGTH = 64
source, out, steps = (
    *sys.argv[1:],
    *(str(Path(__file__).parent / "ref-llama-16m"), tempfile.mkdtemp(), "4")[len(sys.argv) - 1 :],
)
text = (Path(__file__).parent / "ref-llama-16m" / "calibration.txt").read_text(encoding="utf-8")[:40_000]
ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids[0]
windows = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]

model = AutoModelForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("W4A16-g64"))
model = get_peft_model(prepare_for_training(model), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()
arguments = TrainingArguments(
    out,
    learning_rate=1e-3,
    max_steps=int(steps),
    per_device_train_batch_size=2,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
)
Trainer(model, arguments, train_dataset=[{"input_ids": window, "labels": window} for window in windows]).train()
model.save_pretrained(out)  # the adapter alone

base = AutoModelForCausalLM.from_pretrained(source, quantization_config=HfQuantConfig("W4A16-g64"))
print(type(PeftModel.from_pretrained(base, out)).__name__, "loaded again from", out)
