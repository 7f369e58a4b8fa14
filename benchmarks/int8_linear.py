"""One W8A8 layer on this CPU beside bf16 and PyTorch's own dynamic INT8; whole models are in `int8_prefill.py`.

    python benchmarks/int8_linear.py

With one thread and with two. Layers take turns, so that whatever slows the machine slows all; medians, rounding of the activations included. The dynamic
linear of PyTorch (`quantized::linear_dynamic`) takes float32 and one scale for all rows; it is timed on float32 activations.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import torch.nn.functional as F
from _results import write
from torch import Tensor

from hf_quant.bench.machine import cpu_name
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels import LinearSpec, select

SHAPES = [(2048, 2048), (4096, 4096), (4096, 11008)]  # K, N
ROWS = (1, 16, 128, 512)
SECONDS = 1.0  # of turns for each cell
ROUND = ("bf16", "W8A8", "linear_dynamic", "W8A16", "W4A8-g128", "W4A8-g32")


def ways(k: int, n: int) -> dict[str, Callable[[int], Callable[[], Tensor]]]:
    """Name to what makes a product of so many rows."""
    codes = torch.randint(256, (n, k), dtype=torch.uint8)
    scale = torch.full((n, 1), 1e-3, dtype=torch.bfloat16)
    dense = torch.randn(n, k).bfloat16() * 0.02
    signed = torch._make_per_channel_quantized_tensor(
        (codes ^ 0x80).view(torch.int8), scale[:, 0].double(), torch.zeros(n, dtype=torch.long), 0
    )
    packed = torch.ops.quantized.linear_prepack(signed, None)

    def of(dtype: torch.dtype, product: Callable[[Tensor], Tensor]) -> Callable[[int], Callable[[], Tensor]]:
        def make(m: int) -> Callable[[], Tensor]:
            x = torch.randn(m, k).to(dtype)
            return lambda: product(x)

        return make

    def ours(slug: str) -> Callable[[int], Callable[[], Tensor]]:
        scheme = QuantScheme.parse(slug)
        spec = LinearSpec(scheme, n, k, torch.bfloat16, "cpu")
        backend = select(spec)
        each = scale.expand(n, scheme.groups(k)).contiguous()
        weight = QuantizedTensor.from_codes(codes >> (8 - scheme.bits), each, None, scheme)
        prepared = backend.prepare(weight, spec)
        return of(torch.bfloat16, lambda x: backend.linear(x, prepared, spec))

    return {
        "bf16": of(torch.bfloat16, lambda x: F.linear(x, dense)),
        "W8A8": ours("W8A8"),
        "linear_dynamic": of(torch.float32, lambda x: torch.ops.quantized.linear_dynamic(x, packed)),
        "W8A16": ours("W8A16-g-1"),
        "W4A8-g128": ours("W4A8-g128"),
        "W4A8-g32": ours("W4A8-g32"),
    }


def in_turns(made: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median microseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(3):
        for run in made.values():
            run()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times["bf16"]) < 5:
        for name, run in made.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(each) for name, each in times.items()}


@torch.inference_mode()
def layers(threads: int) -> list[dict[str, Any]]:
    """Every shape at every number of rows."""
    torch.set_num_threads(threads)
    found = []
    for k, n in SHAPES:
        made = ways(k, n)
        for m in ROWS:
            cell: dict[str, Any] = {"threads": threads, "k": k, "n": n, "m": m}
            found.append(cell | in_turns({name: make(m) for name, make in made.items()}))
            print(json.dumps(found[-1]), file=sys.stderr)
    return found


def page(record: dict[str, Any]) -> str:
    lines = [f"{record['machine']}, torch {record['torch']}, {record['date']}."]
    lines += ["", "Microseconds, and how much faster than bf16:", ""]
    lines += ["| threads | K x N | rows | " + " | ".join(ROUND) + " |", "|---" * (len(ROUND) + 3) + "|"]
    for cell in record["layers"]:
        shown = [f"{cell[name]:.0f} ({cell['bf16'] / cell[name]:.2f}x)" for name in ROUND]
        lines.append(f"| {cell['threads']} | {cell['k']} x {cell['n']} | {cell['m']} | " + " | ".join(shown) + " |")
    return "# W8A8 on a CPU\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    record = {
        "machine": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}, AMX {torch.cpu._is_amx_tile_supported()})",
        "torch": torch.__version__, "date": str(date.today()), "layers": [*layers(1), *layers(2)],
    }  # fmt: skip
    write("int8_linear", record, page(record))


if __name__ == "__main__":
    main()
