"""QLoRA under FSDP2: two processes, the codes shared out between them. Started by the test, with the model and the scheme."""

from __future__ import annotations

import os
import sys
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_quant import HfQuantConfig, prepare_for_training

os.environ["HF_QUANT_BACKEND"] = "dequant"  # reads the codes where FSDP has gathered them
ROWS = torch.arange(2, 66).reshape(4, 16)


def adapted() -> Any:
    """The quantized model with fresh adapters."""
    torch.manual_seed(0)
    config = HfQuantConfig(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=config)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(prepare_for_training(model, gradient_checkpointing=False), lora)


def train(model: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The adapters after three steps."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained.items()}


def main() -> None:
    """Train in two processes, and compare with training in one."""
    dist.init_process_group("gloo")
    alone = train(adapted(), ROWS)
    model = adapted()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    held = [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]
    assert all(isinstance(p, DTensor) and p.dtype is torch.uint8 for p in held)
    whole, mine = (sum(t.nelement() for t in ts) for ts in (held, [p.to_local() for p in held]))
    for name, tensor in train(model, ROWS.chunk(2)[dist.get_rank()]).items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-5)
    if dist.get_rank() == 0:
        sys.stdout.write(f"{len(alone)} adapters, {mine / whole:.2f} of the codes\n")
    dist.destroy_process_group()


main()
