"""One quantized linear layer on a CPU: ours beside dense products, plain dequantizing, torchao and optimum-quanto.

    python benchmarks/cpu_linear.py

One run: every contender gets the same activations in turn, over several copies of the weight that together exceed the
last-level cache. Medians in milliseconds; torchao and optimum-quanto are measured where they are installed.
"""

import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from _results import write

from hf_quant.bench.machine import cpu_name
from hf_quant.core.scheme import QuantScheme
from hf_quant.formats import format_named
from hf_quant.methods import method
from hf_quant.nn import QuantLinear
from hf_quant.nn._weight import frozen

N = K = 4096
ROWS = (1, 4, 16, 128, 512)
SCHEMES = ("W4A16-g128", "W4A16-g128-asym", "W8A16-g128", "W8A16-g-1", "W3A16-g128", "W2A16-g128")
COPIES = {"dense": 4, "quantized": 8}  # 4 x 32 MB and 8 x 8 MB: beyond a last-level cache of 48 MB
SECONDS = 0.5  # per contender and number of rows

Contender = list[Callable[[torch.Tensor], torch.Tensor]]


def ours(scheme: QuantScheme) -> tuple[Contender, str]:
    weight = method("rtn", steps=0).quantize(torch.randn(N, K), scheme, torch.bfloat16)
    layers = []
    for _ in range(COPIES["quantized"]):
        layer = QuantLinear(K, N, scheme, bias=False, dtype=torch.bfloat16)
        for name, tensor in format_named("native").write(weight).items():
            setattr(layer, name, frozen(tensor.clone()))
        layer.choose_kernel()
        layers.append(layer)
    return layers, type(layers[0]._backend).__name__


def dequantizing(scheme: QuantScheme, dtype: torch.dtype) -> Contender:
    weight = method("rtn", steps=0).quantize(torch.randn(N, K), scheme, torch.bfloat16)
    return [lambda x: F.linear(x.to(dtype), weight.dequantize(dtype)).to(x.dtype)]


def dense(dtype: torch.dtype) -> Contender:
    weights = [torch.randn(N, K, dtype=dtype) for _ in range(COPIES["dense"])]
    return [lambda x, w=w: F.linear(x.to(dtype), w) for w in weights]


def torchao(bits: int) -> Contender:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(128))
    layers = []
    for _ in range(COPIES["dense"]):
        layer = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16))
        quantize_(layer, config)
        layers.append(layer)
    return layers


def quanto(bits: int) -> Contender:
    from optimum.quanto import freeze, qint4, qint8, quantize

    layers = []
    for _ in range(COPIES["dense"]):
        layer = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16))
        quantize(layer, weights=qint8 if bits == 8 else qint4)
        freeze(layer)
        layers.append(layer)
    return layers


def medians(contenders: dict[str, Contender], x: torch.Tensor) -> dict[str, float]:
    """Milliseconds of each; they take turns, so that what disturbs the machine disturbs all of them."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for calls in contenders.values():
        calls[0](x)
    end = time.perf_counter() + SECONDS * len(contenders)
    turn = 0
    while time.perf_counter() < end or turn < 3:
        for name, calls in contenders.items():
            start = time.perf_counter()
            calls[turn % len(calls)](x)
            times[name].append(1e3 * (time.perf_counter() - start))
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "torchao", "optimum-quanto"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    with torch.inference_mode():
        floats = {"bf16": dense(torch.bfloat16), "fp32": dense(torch.float32)}
        for slug in SCHEMES:
            scheme = QuantScheme.parse(slug)
            layers, backend = ours(scheme)
            contenders: dict[str, Contender] = {"ours": layers, **floats}
            contenders["dequantize bf16"] = dequantizing(scheme, torch.bfloat16)
            contenders["dequantize fp32"] = dequantizing(scheme, torch.float32)
            if scheme.bits in (4, 8):
                for name, make in (("torchao", torchao), ("quanto", quanto)):
                    try:
                        contenders[name] = make(scheme.bits)
                        contenders[name][0](torch.randn(1, K, dtype=torch.bfloat16))
                    except Exception as error:  # whatever a contender lacks here is reported, not hidden
                        contenders.pop(name, None)
                        notes[f"{name} {scheme.bits} bits"] = (
                            f"not measured: {type(error).__name__}: {str(error)[:160]}"
                        )
            for m in ROWS:
                row = {"scheme": slug, "M": m, "kernel": backend}
                row |= medians(contenders, torch.randn(m, K, dtype=torch.bfloat16))
                rows.append(row)
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    report(rows, notes)


def report(rows: list[dict[str, Any]], notes: dict[str, str]) -> None:
    about = {
        "cpu": cpu_name(), "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
        "shape": [N, K], "date": str(date.today()), **versions(),
    }  # fmt: skip
    others = ("bf16", "fp32", "dequantize bf16", "dequantize fp32", "torchao", "quanto")
    lines = ["| scheme | M | kernel | ours ms | " + " | ".join(f"{o} ms (ratio)" for o in others) + " |"]
    lines.append("|---" * (4 + len(others)) + "|")
    slower = []
    for row in rows:
        cells = [f"{row[o]:.2f} ({row[o] / row['ours']:.2f}x)" if o in row else "-" for o in others]
        lines.append(
            f"| {row['scheme']} | {row['M']} | {row['kernel']} | {row['ours']:.2f} | " + " | ".join(cells) + " |"
        )
        if row["ours"] > min(row["dequantize bf16"], row["dequantize fp32"]):
            slower.append(f"{row['scheme']} M={row['M']}")
    verdict = f"Slower than dequantizing: {', '.join(slower) or 'nowhere'}. A ratio above 1 means ours is faster."
    text = "\n".join([str(about), "", *lines, "", verdict, "", *(f"- {k}: {v}" for k, v in notes.items())])
    write("cpu_linear", {"about": about, "notes": notes, "rows": rows}, text)
    print(text)
    sys.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
