"""Rounding by the compiled module: what PyTorch computes, bit for bit, on every instruction set; and without the module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_quant.core import numerics, rounding
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import SchemeError
from hf_quant.kernels._native import compiled
from hf_quant.kernels._native import rounding as native
from hf_quant.methods import method

built = pytest.mark.skipif(compiled._cpu is None, reason="not compiled")


@built
@pytest.mark.parametrize(
    "level", [level for level in compiled.LEVELS if level in ("portable", "avx2", "avx512", "dotprod")]
)
def test_every_instruction_set_finds_what_pytorch_finds(level: str) -> None:
    here = Path(__file__).with_name("_rounding_levels.py")
    call = [sys.executable, "-W", "ignore", str(here)]
    done = subprocess.run(call, env=os.environ | {"HF_QUANT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["level"] in compiled.LEVELS[: compiled.LEVELS.index(level) + 1]  # or less, on lesser machines
    assert result["worst"] < 1e-5 and result["compared"] > 10000, result


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    """Whether all parts have the same bits."""
    parts, others = one.parts(), other.parts()
    return parts.keys() == others.keys() and all(numerics.same_bits(parts[name], others[name]) for name in parts)


@built
@pytest.mark.parametrize("name", ["rtn", "gptq", "hqq"])
@pytest.mark.parametrize("slug", ["W4A16-g32", "W3A16-g64-asym", "W8A8", "W4A16-g32-o1%", "W2A16-g32-asym"])
def test_methods_give_the_same_bytes_without_the_module(name: str, slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme, stats = torch.randn(80, 192).bfloat16(), QuantScheme.parse(slug).fitted(192), InputStats.empty(192)
    stats.update(torch.randn(300, 192) * torch.logspace(-1, 1, 192))
    for inputs in [stats] if name == "gptq" else [stats, None]:
        compiled_result = method(name).quantize(weight, scheme, torch.bfloat16, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "_cpu", None)
            assert same(method(name).quantize(weight, scheme, torch.bfloat16, inputs), compiled_result)


@built
def test_groups_in_doubt_are_few_and_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    groups, scheme = torch.randn(256, 32, 128), QuantScheme(4, 128)
    shares = torch.linspace(1, 0.6, 20)
    scale, _zero, doubtful = native.search(groups, scheme, torch.float32, shares, None)
    assert 0 < float(doubtful.float().mean()) < 0.01
    asked = []
    plain = numerics.search

    def counted(picked: torch.Tensor, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(len(picked))
        return plain(picked, *arguments)

    monkeypatch.setattr(numerics, "search", counted)
    whole = rounding.search(groups, scheme, torch.float32, 20, 0.6)[0]
    assert asked == [int(doubtful.sum())]
    assert torch.equal(whole[~doubtful], scale[~doubtful])


def test_columns_that_fill_no_words_are_refused() -> None:
    one = torch.ones(2, 1, 1)
    with pytest.raises(SchemeError, match="must be a multiple of 32, got 24"):
        rounding.encode(torch.randn(2, 1, 24), one, one, QuantScheme(4, -1))


@built
def test_the_module_refuses_what_it_cannot_read() -> None:
    for name, arguments in (("search", [0] * 15), ("encode", [0] * 9)):
        with pytest.raises(ValueError, match="no weight has 0 groups of 0"):
            getattr(compiled._cpu, name)(*arguments)
        with pytest.raises(TypeError, match="integers"):
            getattr(compiled._cpu, name)(1)
    x = torch.randn(4, 32)
    at = x.data_ptr()
    with pytest.raises(ValueError, match="importance of 0 groups"):
        compiled._cpu.search(at, 0, 4, 32, at, 0, at, 20, 4, 1, 0, at, at, at, 1)
    with pytest.raises(ValueError, match="no multiple of 8"):
        compiled._cpu.encode(at, 0, 4, 12, at, at, 4, at, 1)
