"""Weights that were trained on a grid and published in bf16: their own codes come out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_quant.core import grid
from hf_quant.core.grid import recovered
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.jobs.grids import grid_of
from hf_quant.methods import method


def on_grid(scheme: QuantScheme, n: int = 48, k: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in bf16, and its codes around the zero point; as in training, few groups reach the end of the range."""
    groups = scheme.groups(k)
    scale = torch.rand(n, groups, 1) * 0.01 + 0.003
    zero = (
        torch.full((n, groups, 1), scheme.zero) if scheme.symmetric else torch.randint(1, scheme.qmax, (n, groups, 1))
    )
    codes = (torch.randn(n, groups, k // groups) * scheme.qmax / 5 + zero).round().clamp(0, scheme.qmax)
    return ((codes - zero) * scale).flatten(1).bfloat16(), (codes - zero).flatten(1)


@pytest.mark.parametrize("slug", ["W4A16-g32", "W4A16-g32-asym", "W3A16-g64", "W2A16-g32-asym", "W8A16-g-1"])
@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_the_codes_of_the_training_come_out(slug: str, name: str) -> None:
    scheme = QuantScheme.parse(slug)
    weight, codes = on_grid(scheme)
    stats = None
    if name == "gptq":
        stats = InputStats.empty(256)
        stats.update(torch.randn(1024, 256) * (0.2 + torch.rand(256)))
    made = method(name).quantize(weight, scheme, torch.bfloat16, stats)
    error = made.dequantize(torch.float32) - weight.float()
    assert float(error.norm() / weight.float().norm()) < 4e-3  # the rounding of scales to bf16
    if slug == "W4A16-g32":
        zeros = made.zeros().repeat_interleave(32, 1).short()
        assert float((made.codes().short() - zeros == codes).float().mean()) > (0.999 if name == "rtn" else 0.99)
        searched = method("rtn", steps=0).quantize(weight, scheme, torch.bfloat16)
        assert float((searched.dequantize(torch.float32) - weight.float()).norm()) > 10 * float(error.norm())


def test_ordinary_weights_lie_on_none() -> None:
    for slug in ("W4A16-g32", "W8A16-g32", "W2A16-g16-asym", "W4A16-g-1"):
        scheme = QuantScheme.parse(slug)
        for weight in (torch.randn(64, 256) * 0.02, torch.zeros(8, 256), torch.ones(8, 256)):
            groups = weight.bfloat16().float().unflatten(-1, (scheme.groups(256), -1))
            assert recovered(groups, scheme, torch.bfloat16) is None or not groups.any() or weight.std() == 0


@pytest.mark.parametrize("slug", ["W8A16-g-1", "W8A16-g32-asym", "W4A16-g128", "W3A16-g64"])
def test_ordinary_weights_are_told_by_a_few_columns(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is looked at while a model loads: the search through all widths would take several times the rounding."""
    monkeypatch.setattr(grid, "_on_grid", lambda *_: pytest.fail("searched"))
    scheme = QuantScheme.parse(slug)
    groups = (torch.randn(64, 256) * 0.02).bfloat16().float().unflatten(-1, (scheme.groups(256), -1))
    assert recovered(groups, scheme, torch.bfloat16) is None


def test_the_grid_of_a_checkpoint_is_named_whatever_scheme_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for weight, said in ((on_grid(QuantScheme(4, 32))[0], "W4A16-g32"), (torch.randn(48, 256).bfloat16(), None)):
        save_file({"model.layers.0.self_attn.q_proj.weight": weight}, tmp_path / "model.safetensors")
        found = grid_of(str(tmp_path), ["W8A8"])
        assert (found is None) == (said is None) and (said is None or said in found)
