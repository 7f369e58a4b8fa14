"""A step of training on a GPU: quantization-aware training of a model of a billion weights, and QLoRA on blocks of 7B.

    python benchmarks/gpu_training.py [--rows FILE]
    python benchmarks/gpu_training.py --dry-run

Seconds of forward, backward and AdamW for 1,024 tokens, and the peak of memory, beside the same step of the float model: with
float32 master weights in both, and for QLoRA beside LoRA on bf16 weights. torchao's QAT where it is installed.
"""

import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _gpu import Rows, device_for, gigabytes, parser, reset_peak, seconds
from gpu_model import SEVEN_BILLION, TINY, make
from torch import nn
from transformers import AutoModelForCausalLM

from hf_quant import HfQuantConfig, prepare_for_training

BILLION = {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
           "vocab_size": 32000, "max_position_embeddings": 2048}  # fmt: skip
QAT = ("W4A16-g128", "W2A16-g64-asym", "W4A8-g128", "W8A8")


def stepping(model: nn.Module, tokens: int, device: torch.device) -> Callable[[], None]:
    """One step of training on the same random tokens, in bf16 where the model computes."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5)
    ids = torch.randint(0, 500, (1, tokens), device=device)
    model.train()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(build: Callable[[], nn.Module], tokens: int, device: torch.device) -> dict[str, Any]:
    reset_peak(device)
    model = build()
    step = stepping(model, tokens, device)
    found = {"seconds": seconds(step, device, repeats=5, warm=2), **gigabytes(device)}
    del model, step
    gc.collect()
    return found


def trainable(folder: Path, name: str, device: torch.device) -> nn.Module:
    config = {} if name == "float" else {"quantization_config": HfQuantConfig(name, training=True)}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=str(device), **config
    )
    return model


def torchao_qat(folder: Path, device: torch.device) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from torchao.quantization.qat import QATConfig

    model = trainable(folder, "float", device)
    quantize_(model, QATConfig(Int4WeightOnlyConfig(group_size=128), step="prepare"))
    return model


def adapted(folder: Path, name: str, device: torch.device) -> nn.Module:
    """With adapters of rank 16 on every linear layer."""
    from peft import LoraConfig, get_peft_model

    config = {} if name == "bf16" else {"quantization_config": HfQuantConfig(name)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=str(device), **config)
    if config:
        model = prepare_for_training(model)
    found: nn.Module = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return found


def main() -> None:
    arguments = parser(__doc__).parse_args()
    rows, device = Rows("training", arguments.rows), device_for(arguments.dry_run)
    root, dry = Path(tempfile.mkdtemp(prefix="hf-quant-gpu-training-")), arguments.dry_run
    tokens = 32 if dry else 1024
    folder = make(root / "billion", TINY if dry else BILLION, device)
    for name in ("float", *QAT):
        rows.attempt({"qat": name}, partial(timed, partial(trainable, folder, name, device), tokens, device))
    rows.attempt({"qat": "torchao"}, partial(timed, partial(torchao_qat, folder, device), tokens, device))
    folder = make(root / "blocks", TINY if dry else SEVEN_BILLION, device, layers=2 if dry else 8)
    for name in ("bf16", "W4A16-g128", "W4A16-g64"):
        rows.attempt({"lora": name}, partial(timed, partial(adapted, folder, name, device), tokens, device))


if __name__ == "__main__":
    main()
