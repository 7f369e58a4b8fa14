"""Modules that are copied, pickled and handed to other processes, and tensors that are made once and kept."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from hf_quant.core.numerics import levels
from hf_quant.kernels import codebook, cpu_int4, cpu_int8


def test_layers_can_be_copied_pickled_and_handed_to_a_process() -> None:
    """Codes come back into the portable layout only to be pickled, in memory that is shared: it must last until it is read."""
    here = Path(__file__).with_name("_copies.py")
    done = subprocess.run([sys.executable, "-W", "ignore", str(here)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"linear": [True] * 4, "experts": [True] * 4, "handed over": True}


def test_tensors_that_are_kept_are_ordinary_even_if_inference_made_them() -> None:
    cpu = torch.device("cpu")
    for kept, arguments in ((levels, ("fp4", cpu)), (cpu_int8._nothing, (16,)), (cpu_int4._rows_at, (32,))):
        kept.cache_clear()
        with torch.inference_mode():
            made = kept(*arguments)
        assert not made.is_inference() and kept(*arguments) is made
        kept.cache_clear()
    codes, scale = torch.randint(256, (8, 16), dtype=torch.uint8), torch.rand(8, 1)
    with torch.inference_mode():
        levels("fp4", cpu)
    x = torch.randn(2, 32, requires_grad=True)
    codebook.codebook_linear(x, codes, scale, levels("fp4", cpu)).sum().backward()
    assert x.grad is not None
