"""One layer on a CPU: the compiled product beside PyTorch's packed int4 product, bf16 and float32, and the speed of memory.

    python benchmarks/cpu_native.py [--threads 1] [--threads 2]

Weights rotate through a gigabyte, so that none comes from a cache; the ways take turns of a tenth of a second, long
enough for clocks to settle after another's instructions; medians. Reading, a dot product of a gigabyte with itself, takes its
turns among them where one row is timed. A share is the packed weight, scales and all, over the time of the whole call, over
the speed of reading: its median, and beside it its best pass. Packed weights lie in large pages, what is read in ordinary
ones: a share may exceed 1.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from _results import RESULTS, write
from torch import Tensor

from hf_quant.bench.machine import cpu_name
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels import LinearBackend, LinearSpec, prepared_tensors
from hf_quant.kernels._native.compiled import built
from hf_quant.kernels.cpu_int4 import CpuInt4
from hf_quant.kernels.cpu_native import CpuNative

SHAPES = ((2048, 2048), (4096, 4096), (11008, 4096))  # N, K
ROWS = (1, 4, 16, 128, 512)
BYTES, SECONDS, TURNS = 1 << 30, 0.1, 5
Run = Callable[[Any], Tensor]
Ways = dict[str, tuple[list[Any], Run]]
CELLS = [("W4A16-g128", *shape) for shape in SHAPES] + [
    (slug, 4096, 4096) for slug in ("W8A16-g128", "W3A16-g128", "W2A16-g128")
]


def weight(slug: str, n: int, k: int) -> QuantizedTensor:
    scheme = QuantScheme.parse(slug)
    codes = torch.randint(256, (n, scheme.packed_bytes(k)), dtype=torch.uint8)
    return QuantizedTensor(codes, torch.full((n, scheme.groups(k)), 1e-3, dtype=torch.bfloat16), None, scheme)


def rotating(tensors: Any, again: Callable[[], Any] | None = None) -> list[Any]:
    """Copies, or tensors made again, where they are laid out in pages that a copy would not have."""
    size = sum(t.nbytes for t in prepared_tensors(tensors))
    return [again() if again else copy.deepcopy(tensors) for _ in range(max(2, BYTES // size))]


def packed(backend: LinearBackend[Any], x: Tensor, spec: LinearSpec) -> Run:
    return lambda prepared: backend.linear(x, prepared, spec)


def product(x: Tensor) -> Run:
    return lambda prepared: F.linear(x, prepared)


def reading() -> tuple[list[Any], Run]:
    buffer = torch.ones(BYTES // 4)
    return [buffer], lambda held: torch.dot(held, held)  # one stream; sums are slower


def in_turns(ways: Ways) -> dict[str, list[float]]:
    """Seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, (copies, run) in ways.items():
            end, here = time.perf_counter() + SECONDS, times[name]
            while (start := time.perf_counter()) < end:
                run(copies[len(here) % len(copies)])
                here.append(time.perf_counter() - start)
    return {name: each[2:] for name, each in times.items()}


def measure(threads: int) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    rows = []
    for slug, n, k in CELLS:
        made, spec = weight(slug, n, k), LinearSpec(QuantScheme.parse(slug), n, k, torch.bfloat16, "cpu")
        backends = {"compiled": CpuNative(), "PyTorch int4": CpuInt4()}
        again = {"compiled": partial(backends["compiled"].prepare, made, spec)}
        held = {
            name: rotating(b.prepare(made, spec), again.get(name))
            for name, b in backends.items()
            if b.why_not(spec) is None
        }
        dense = rotating(torch.randn(n, k).bfloat16())
        wide = rotating(torch.randn(n, k)) if n == k == 4096 and slug.startswith("W4") else None
        for m in ROWS:
            x = torch.randn(m, k).bfloat16()
            ways: Ways = {name: (copies, packed(backends[name], x, spec)) for name, copies in held.items()}
            ways["bf16"] = (dense, product(x))
            if wide is not None:
                ways["float32"] = (wide, product(x.float()))
            if m == 1:
                ways["reading"] = reading()
            times = in_turns(ways)
            rows.append({"threads": threads, "scheme": slug, "n": n, "k": k, "rows": m,
                         "seconds": {name: statistics.median(each) for name, each in times.items()}})  # fmt: skip
            if m == 1:
                size, passes = sum(t.nbytes for t in prepared_tensors(held["compiled"][0])), times["reading"]
                speeds = {"median": BYTES / statistics.median(passes), "best": BYTES / min(passes)}
                own = size / statistics.median(times["compiled"])
                rows[-1] |= {"read_bytes_per_second": speeds, "share": {name: own / v for name, v in speeds.items()}}
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, action="append")
    asked = parser.parse_args().threads or [1, 2]
    file = RESULTS / "cpu_native.json"
    kept = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows = [row for row in kept if row["threads"] not in asked]
    for threads in asked:
        rows += measure(threads)
    about = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "instruction_set": built(), "torch": version("torch"),
        "hf-quant": version("hf-quant"), "date": str(date.today()),
    }  # fmt: skip
    lines = ["# The compiled product on a CPU", "", str(about), ""]
    for threads in sorted({row["threads"] for row in rows}):
        here = [row for row in rows if row["threads"] == threads]
        speeds = [row["read_bytes_per_second"]["median"] / 1e9 for row in here if row["rows"] == 1]
        lines += [f"## {threads} thread(s), reading at {min(speeds):.1f} to {max(speeds):.1f} GB/s", "",
                  "| scheme | N x K | rows | compiled us | of reading (of its best) | PyTorch int4 us (ratio) | bf16 us (ratio) | float32 us (ratio) |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in here:
            own = row["seconds"]["compiled"]
            others = [
                f"{row['seconds'][name] * 1e6:.0f} ({row['seconds'][name] / own:.2f}x)"
                if name in row["seconds"]
                else "-"
                for name in ("PyTorch int4", "bf16", "float32")
            ]
            share = "{median:.0%} ({best:.0%})".format(**row["share"]) if row["rows"] == 1 else "-"
            lines.append(
                f"| {row['scheme']} | {row['n']} x {row['k']} | {row['rows']} | {own * 1e6:.0f} | {share} | {' | '.join(others)} |"
            )
        lines.append("")
    write("cpu_native", {"about": about, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
