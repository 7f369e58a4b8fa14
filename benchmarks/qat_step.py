"""Step time of a layer whose weight is rounded while it trains, beside ``nn.Linear``: forward, backward, and the update by AdamW.

    python benchmarks/qat_step.py [--threads 1] [--device cpu] [--dtype float32]

All are timed in turns, and the smallest of several times counts; 1.3 times the float layer is the goal. With one thread on a CPU
it is the time of the processor that counts, so that others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_quant.core.scheme import QuantScheme
from hf_quant.methods import method
from hf_quant.training import FakeQuantLinear

SIZES = ((384, 1024), (1024, 4096))  # in and out features
TOKENS = (512, 2048)
SCHEMES = ("W4A16-g128", "W2A16-g64-asym", "W4A8-g128")


def step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-6)

    def run() -> None:
        y = layer(x)
        y.backward(torch.ones_like(y))
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return run


def seconds(runs: list[Callable[[], None]], repeats: int, device: str) -> list[float]:
    clock = time.perf_counter if device == "cuda" or torch.get_num_threads() > 1 else time.process_time
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            best[i] = min(best[i], clock() - start)
    return best


def main(a: argparse.Namespace) -> None:
    torch.set_num_threads(a.threads)
    dtype = getattr(torch, a.dtype)
    print(f"torch {torch.__version__}, {a.device}, {a.threads} threads, {a.dtype}")
    print(f"{'in x out':>12} {'tokens':>7} {'nn.Linear ms':>13}", *(f"{slug:>16}" for slug in SCHEMES))
    for k, n in SIZES:
        for tokens in TOKENS:
            x = torch.randn(tokens, k, device=a.device, dtype=dtype, requires_grad=True)
            weight = torch.randn(n, k, device=a.device) / k**0.5
            layers: list[nn.Module] = [nn.Linear(k, n, bias=False, device=a.device, dtype=dtype)]
            for slug in SCHEMES:
                start = method("rtn", steps=0).quantize(weight, QuantScheme.parse(slug), dtype)
                layers.append(FakeQuantLinear(weight, start, bias=None, dtype=dtype))
            plain, *others = seconds([step(layer, x) for layer in layers], a.repeats, a.device)
            print(
                f"{f'{k} x {n}':>12} {tokens:>7} {1e3 * plain:>13.2f}", *(f"{each / plain:>15.2f}x" for each in others)
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    main(parser.parse_args())
