"""What it costs to pad layers whose in_features is no multiple of 32, beside leaving them in floating point.

    python benchmarks/padded_widths.py [--seconds SECONDS]

A layer of K inputs is computed as one of the next multiple of 32: zeros are put behind the inputs of every call, and the weight has zero
columns there. Time and bytes of that, of the layer in bfloat16 and in float32, and of the padded product alone, in turns in one run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _results import write

from hf_quant.bench.machine import cpu_name
from hf_quant.core.numerics import padded
from hf_quant.core.scheme import QuantScheme
from hf_quant.methods import method, quantize
from hf_quant.nn import QuantLinear

# in_features that real models have: fc2 of SigLIP So400m (Gemma 3, PaliGemma), Qwen2.5-VL's tower, EVA02-L, a rank of adapters
SHAPES = {
    "SigLIP So400m fc2": (1152, 4304),
    "Qwen2.5-VL vision down": (1280, 3420),
    "EVA02-L fc2": (1024, 2730),
    "narrow": (512, 100),
}
SCHEMES = ("W4A16-g32", "W8A16-g32", "W8A8")
ROWS = (1, 256)


def layers_of(weight: Tensor, scheme: QuantScheme) -> tuple[QuantLinear, QuantLinear, int]:
    """The layer of a weight, the same with its padding as inputs like all others, and the bytes of either."""
    codes = quantize(method("rtn"), weight, scheme, torch.bfloat16)
    size = sum(part.nbytes for part in codes.parts().values())
    return QuantLinear.of(codes, torch.bfloat16), QuantLinear.of(codes.stored, torch.bfloat16), size


def times(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    seen: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seen[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in seen.items()}


def row(name: str, weight: Tensor, slug: str, rows: int, seconds: float) -> str:
    """A row of the table."""
    n, k = weight.shape
    scheme = QuantScheme.parse(slug).fitted(k)
    run, product, nbytes = layers_of(weight, scheme)
    x, plain = torch.randn(rows, k).bfloat16(), weight.bfloat16()
    wide, exact = padded(x, scheme), nn.functional.linear(x.float(), weight)
    took = times(
        {
            "padded": lambda: run(x),
            "product": lambda: product(wide),
            "bf16": lambda: nn.functional.linear(x, plain),
            "float32": lambda: nn.functional.linear(x.float(), weight),
        },
        seconds,
    )
    off = float((run(x).float() - exact).norm() / exact.norm())
    milliseconds = " | ".join(f"{took[column]:.3f}" for column in ("padded", "product", "bf16", "float32"))
    return f"| {name} {n} x {k} | {slug} | {rows} | {milliseconds} | {nbytes / (2 * n * k):.2f} | {off:.4f} |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.5, help="for each row of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Padded widths",
        "",
        f"One thread, {cpu_name()}, torch {torch.__version__}, {date.today()}; made by `benchmarks/padded_widths.py`. Milliseconds (median), "
        "bytes in parts of bfloat16, error in parts of the output.",
        "",
        "| layer | scheme | rows | padded | product alone | bfloat16 | float32 | bytes | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (n, k) in SHAPES.items():
        torch.manual_seed(0)
        weight = torch.randn(n, k) / k**0.5
        for slug in SCHEMES:
            lines += [row(name, weight, slug, rows, options.seconds) for rows in ROWS]
            print(*lines[-len(ROWS) :], sep="\n", flush=True)
    write(
        "padded_widths",
        {"cpu": cpu_name(), "torch": torch.__version__, "date": str(date.today()), "rows": lines[6:]},
        "\n".join(lines),
    )


if __name__ == "__main__":
    main()
