"""Measure a quantized model with tasks of lm-evaluation-harness, its base beside it. Needs lm-eval, and the tasks' data.

pip install "lm-eval[hf]"
python examples/evaluate.py FOLDER BASE TASK [TASK...]      # for example: ... out/w4 someone/model arc_easy; or a YAML file
"""

import sys
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

if len(sys.argv) < 4:
    sys.exit(__doc__)
models, names = sys.argv[1:3], sys.argv[3:]
own = [str(Path(name).resolve().parent) for name in names if name.endswith(".yaml")]
tasks, manager = [Path(name).stem for name in names], TaskManager(include_path=own or None)
device = "cuda" if torch.cuda.is_available() else "cpu"  # the harness takes "cuda" where nothing is said
for model in models:  # the harness loads both with from_pretrained; a quantized model says itself what it is
    found = simple_evaluate(
        model="hf", model_args=f"pretrained={model}", tasks=tasks, task_manager=manager, device=device
    )
    for task, numbers in found["results"].items():
        values = {name.partition(",")[0]: value for name, value in numbers.items() if isinstance(value, float)}
        print(model, task, *(f"{name} {value:.4f}" for name, value in values.items()))
