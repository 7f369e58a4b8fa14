"""One layer on a CPU: the compiled product beside PyTorch's packed int4 product, bf16 and float32, and the speed of memory.

    python benchmarks/cpu_native.py [--threads 1] [--threads 2] [--prompts]

``--prompts`` times prompts of 16 to 512 tokens beside bf16 alone, in seconds of the processor, which other programs on
the machine do not change.

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
from _results import RESULTS, stem_for, write
from torch import Tensor

from hf_quant.bench.machine import cpu_name
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels import LinearBackend, LinearSpec, prepared_tensors
from hf_quant.kernels._native.compiled import built
from hf_quant.kernels.cpu_int4 import CpuInt4
from hf_quant.kernels.cpu_native import CpuNative
from hf_quant.kernels.cpu_native_int8 import CpuNativeInt8

SHAPES = ((2048, 2048), (4096, 4096), (11008, 4096))  # N, K
ROWS = (1, 4, 16, 128, 512)
PROMPTS = (16, 32, 64, 128, 256, 512)
BYTES, SECONDS, TURNS = 1 << 30, 0.1, 5
Run = Callable[[Any], Tensor]
Ways = dict[str, tuple[list[Any], Run]]
CELLS = [("W4A16-g128", *shape) for shape in SHAPES] + [
    (slug, 4096, 4096) for slug in ("W8A16-g128", "W3A16-g128", "W2A16-g128")
]

PROMPT_CELLS = [
    (slug, *shape)
    for slug in ("W4A16-g128", "W8A16-g128", "W3A16-g128", "W2A16-g128", "W8A8", "W4A8-g128")
    for shape in (*SHAPES, (576, 1536))
] + [("W4A16-g32", 4096, 4096), ("W4A16-g128-asym", 4096, 4096), ("W4A8-g32", 4096, 4096)]
Clock = Callable[[], float]


def weight(slug: str, n: int, k: int) -> QuantizedTensor:
    scheme = QuantScheme.parse(slug)
    codes = torch.randint(256, (n, scheme.packed_bytes(k)), dtype=torch.uint8)
    zero = None if scheme.symmetric else torch.randint(1 << scheme.bits, (n, scheme.groups(k)), dtype=torch.uint8)
    return QuantizedTensor(codes, torch.full((n, scheme.groups(k)), 1e-3, dtype=torch.bfloat16), zero, scheme)


def rotating(tensors: Any, again: Callable[[], Any] | None = None, total: int = BYTES) -> list[Any]:
    """Copies, ``total`` bytes of them, or tensors made again, where they are laid out in pages that a copy would not have."""
    size = sum(t.nbytes for t in prepared_tensors(tensors))
    return [again() if again else copy.deepcopy(tensors) for _ in range(max(2, total // size))]


def packed(backend: LinearBackend[Any], x: Tensor, spec: LinearSpec) -> Run:
    return lambda prepared: backend.linear(x, prepared, spec)


def product(x: Tensor) -> Run:
    return lambda prepared: F.linear(x, prepared)


def reading() -> tuple[list[Any], Run]:
    buffer = torch.ones(BYTES // 4)
    return [buffer], lambda held: torch.dot(held, held)  # one stream; sums are slower


def in_turns(ways: Ways, clock: Clock = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, (copies, run) in ways.items():
            end, here = clock() + SECONDS, times[name]
            while (start := clock()) < end:
                run(copies[len(here) % len(copies)])
                here.append(clock() - start)
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


def prompts(threads: int) -> list[dict[str, object]]:
    """Ours and bf16 in seconds of the processor, all threads together."""
    torch.set_num_threads(threads)
    rows = []
    for slug, n, k in PROMPT_CELLS:
        made, spec = weight(slug, n, k), LinearSpec(QuantScheme.parse(slug), n, k, torch.bfloat16, "cpu")
        backend: LinearBackend[Any] = CpuNativeInt8() if spec.scheme.activations else CpuNative()
        again = partial(backend.prepare, made, spec)
        held, dense = rotating(again(), again, BYTES // 8), rotating(torch.randn(n, k).bfloat16(), total=BYTES // 4)
        for m in PROMPTS:
            x = torch.randn(m, k).bfloat16()
            times = in_turns(
                {"compiled": (held, packed(backend, x, spec)), "bf16": (dense, product(x))}, time.process_time
            )
            seconds = {name: statistics.median(each) for name, each in times.items()}
            rows.append({"threads": threads, "scheme": slug, "n": n, "k": k, "rows": m, "seconds": seconds})
            print(rows[-1], seconds["bf16"] / seconds["compiled"], flush=True)
    return rows


def prompt_page(about: dict[str, object], rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Prompts on a CPU: seconds of the processor in bf16 over those of the compiled product",
        "",
        str(about),
        "",
    ]
    for threads in sorted({row["threads"] for row in rows}):
        lines += [f"## {threads} thread(s)", "", f"| scheme | N x K | {' | '.join(f'{m} rows' for m in PROMPTS)} |",
                  "|---|---|" + "---|" * len(PROMPTS)]  # fmt: skip
        for slug, n, k in PROMPT_CELLS:
            here = [r["seconds"] for r in rows if (r["threads"], r["scheme"], r["n"], r["k"]) == (threads, slug, n, k)]
            ratios = " | ".join(f"{s['bf16'] / s['compiled']:.2f}x" for s in here)
            lines += [f"| {slug} | {n} x {k} | {ratios} |"] if here else []
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--prompts", action="store_true")
    args = parser.parse_args()
    asked = args.threads or [1, 2]
    name = "cpu_native_prompts" if args.prompts else "cpu_native"
    file = RESULTS / f"{stem_for(RESULTS, name, cpu_name())}.json"
    kept = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows = [row for row in kept if row["threads"] not in asked]
    for threads in asked:
        rows += prompts(threads) if args.prompts else measure(threads)
    about = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "instruction_set": built(), "torch": version("torch"),
        "hf-quant": version("hf-quant"), "date": str(date.today()),
    }  # fmt: skip
    if args.prompts:
        write(name, {"about": about, "rows": rows}, prompt_page(about, rows))
        return
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
    write(name, {"about": about, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
