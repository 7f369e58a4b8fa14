"""Adapters train on top of a quantized model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_quant import HfQuantConfig, prepare_for_training
from hf_quant.nn import QuantLinear

from .conftest import IDS

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W8A16-g32", "W3A16-g32-asym"])
def test_lora_on_all_linear_layers(zoo: Any, tmp_path: Path, scheme: str) -> None:
    folder = zoo("llama")[1]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig(scheme))
    codes = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    model = prepare_for_training(model)
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    wrapped = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(wrapped) == len(codes)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    model.train()
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    base = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, QuantLinear)}
    assert all(torch.equal(m.dequantize(), codes[n.replace(".base_layer", "")]) for n, m in base.items())
    model.eval()
    with torch.no_grad():
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig(scheme))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)


def test_gradients_are_those_of_the_dequantized_layer() -> None:
    torch.manual_seed(0)
    from hf_quant.core.scheme import QuantScheme
    from hf_quant.formats import format_named
    from hf_quant.methods import method
    from hf_quant.nn._weight import frozen

    scheme = QuantScheme(4, 32)
    made = method("rtn").quantize(torch.randn(48, 64), scheme, torch.float32)
    layer = QuantLinear(64, 48, scheme, bias=False, dtype=torch.float32)
    for name, tensor in format_named("native").write(made).items():
        setattr(layer, name, frozen(tensor))
    layer.choose_kernel()
    x = torch.randn(40, 64, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    other = x.detach().clone().requires_grad_()
    (other @ made.dequantize().T).square().sum().backward()
    assert x.grad is not None and other.grad is not None
    assert (x.grad - other.grad).norm() < 1e-2 * other.grad.norm()  # a few rows are rounded to bf16 on the way forward
