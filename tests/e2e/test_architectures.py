"""Every kind of architecture: quantized while loading, saved, reloaded; the reloaded logits are bit-equal."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant import HfQuantConfig
from hf_quant.nn import QuantExperts, QuantLinear

from .conftest import ZOO


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Median over positions: a router may send one token elsewhere after the least rounding."""
    a, b = a.float(), b.float()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


@pytest.mark.parametrize("scheme", ["W8A16-g32", "W4A16-g32-asym"])
@pytest.mark.parametrize("name", list(ZOO))
def test_quantize_save_reload(zoo: Any, tmp_path: Path, name: str, scheme: str) -> None:
    arch, folder = zoo(name)
    model = arch.auto.from_pretrained(folder, quantization_config=HfQuantConfig(scheme))
    plan = model.hf_quantizer.plan
    assert any(isinstance(m, (QuantLinear, QuantExperts)) for m in model.modules())
    got = arch.run(model)
    assert got.isfinite().all()
    base = arch.auto.from_pretrained(folder)
    assert relative(got, arch.run(base)) < (0.05 if "W8" in scheme else 0.6)
    dense = base.num_parameters()
    assert plan.params == dense, "tied parameters are counted once"

    model.save_pretrained(tmp_path / "out", max_shard_size="60KB")
    again, info = arch.auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(arch.run(again), got)
    assert again.hf_quantizer.plan.schemes == plan.schemes
    again.save_pretrained(tmp_path / "third")
    third = arch.auto.from_pretrained(tmp_path / "third")
    assert torch.equal(arch.run(third), got)


@pytest.mark.parametrize("name", list(ZOO))
def test_dequantized_model_computes_the_same(zoo: Any, tmp_path: Path, name: str) -> None:
    """An independent check of every forward: the float model holding the same dequantized weights."""
    arch, folder = zoo(name)
    model = arch.auto.from_pretrained(folder, quantization_config=HfQuantConfig("W4A16-g32"), dtype=torch.float32)
    got = arch.run(model)
    dense = model.dequantize()
    assert not any(isinstance(m, (QuantLinear, QuantExperts)) for m in dense.modules())
    assert relative(arch.run(dense), got) < 1e-2  # bf16 activations where a low-bit CPU op runs
    dense.save_pretrained(tmp_path)
    plain = arch.auto.from_pretrained(tmp_path)
    assert getattr(plain, "hf_quantizer", None) is None
    assert torch.allclose(arch.run(plain), arch.run(dense), atol=1e-5)
