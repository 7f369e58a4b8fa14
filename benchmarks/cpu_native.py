"""One layer on a CPU: the compiled product beside PyTorch's packed int4 product, bf16 and float32, and the speed of memory.

    python benchmarks/cpu_native.py [--threads 1] [--threads 2] [--prompts [--level avx2] [--dtype float32]]

``--prompts`` times prompts of 16 to 512 tokens beside bf16 alone, in seconds of the processor, which other programs on
the machine do not change; several threads by the clock, since one that waits for another takes the processor too. ``--level`` limits the instructions of our kernels and of PyTorch's, ``--dtype`` says what dtype is
multiplied and compared with; what these two measure has a table of its own.

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
import sys
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
from hf_quant.kernels._native.compiled import _cpu, built
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
LIMITS = {  # on PyTorch and its libraries
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
DTYPES = ("float32", "float16", "bfloat16")


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


def prompts(threads: int, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, object]]:
    """Ours and PyTorch's product of a dtype: seconds of the processor for one thread, of the clock for more."""
    torch.set_num_threads(threads)
    rows, name = [], "bf16" if dtype is torch.bfloat16 else str(dtype).removeprefix("torch.")
    for slug, n, k in PROMPT_CELLS:
        made, spec = weight(slug, n, k), LinearSpec(QuantScheme.parse(slug), n, k, dtype, "cpu")
        backend: LinearBackend[Any] = CpuNativeInt8() if spec.scheme.activations else CpuNative()
        if backend.why_not(spec):  # INT8 activations need instructions for them
            continue
        again = partial(backend.prepare, made, spec)
        held, dense = rotating(again(), again, BYTES // 8), rotating(torch.randn(n, k).to(dtype), total=BYTES // 4)
        for m in PROMPTS:
            x = torch.randn(m, k).to(dtype)
            times = in_turns(
                {"compiled": (held, packed(backend, x, spec)), name: (dense, product(x))},
                time.process_time if threads == 1 else time.perf_counter,
            )
            seconds = {way: statistics.median(each) for way, each in times.items()}
            rows.append({"threads": threads, "scheme": slug, "n": n, "k": k, "rows": m, "seconds": seconds})
            print(rows[-1], seconds[name] / seconds["compiled"], flush=True)
    return rows


def prompt_table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    """PyTorch's seconds over ours, one line for each weight."""
    lines = [f"## {title}", "", f"| scheme | N x K | {' | '.join(f'{m} rows' for m in PROMPTS)} |",
             "|---|---|" + "---|" * len(PROMPTS)]  # fmt: skip
    for slug, n, k in PROMPT_CELLS:
        here = [r["seconds"] for r in rows if (r["scheme"], r["n"], r["k"]) == (slug, n, k)]
        ratios = " | ".join(
            f"{other / s['compiled']:.2f}x" for s in here for way, other in s.items() if way != "compiled"
        )
        lines += [f"| {slug} | {n} x {k} | {ratios} |"] if here else []
    return [*lines, ""]


def prompt_page(about: dict[str, object], rows: list[dict[str, Any]]) -> str:
    title = "# Prompts on a CPU: seconds in bf16 over those of the compiled product"
    lines = [title, "", str(about), ""]
    for threads in sorted({row["threads"] for row in rows}):
        lines += prompt_table(f"{threads} thread(s)", [row for row in rows if row["threads"] == threads])
    return "\n".join(lines)


def level_page(about: dict[str, object], rows: list[dict[str, Any]]) -> str:
    title = "# Prompts on a CPU with fewer instructions and other dtypes: PyTorch's seconds of the processor over ours"
    lines = [
        title,
        "",
        "PyTorch multiplies dense weights of the dtype, with no more instructions than ours.",
        "",
        str(about),
        "",
    ]
    for level, dtype, threads in sorted({(row["level"], row["dtype"], row["threads"]) for row in rows}):
        here = [row for row in rows if (row["level"], row["dtype"], row["threads"]) == (level, dtype, threads)]
        lines += prompt_table(f"{level}, {dtype}, {threads} thread(s)", here)
    return "\n".join(lines)


def limited(level: str) -> None:
    """Limits our kernels, and PyTorch's by running this script again: they look at the environment once."""
    if any(os.environ.get(name) != value for name, value in LIMITS[level].items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | LIMITS[level])
    _cpu.limit(level)
    if built() != level:
        raise SystemExit(f"this processor has no more than {built()}")


def measure_level(level: str, dtypes: list[str], asked: list[int]) -> None:
    limited(level)
    name = "cpu_native_levels"
    file = RESULTS / f"{stem_for(RESULTS, name, cpu_name())}.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    for dtype in dtypes:
        for threads in asked:
            rows = [row for row in rows if (row["level"], row["dtype"], row["threads"]) != (level, dtype, threads)]
            rows += [row | {"level": level, "dtype": dtype} for row in prompts(threads, getattr(torch, dtype))]
    about = machine()
    write(name, {"about": about, "rows": rows}, level_page(about, rows))


def machine() -> dict[str, object]:
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": version("torch"), "hf-quant": version("hf-quant"),
            "date": str(date.today())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--prompts", action="store_true")
    parser.add_argument("--level", choices=LIMITS)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    args = parser.parse_args()
    if (args.level or args.dtype) and not args.prompts:
        parser.error("--level and --dtype are options of --prompts")
    asked = args.threads or [1, 2]
    if args.level or args.dtype:
        measure_level(args.level or built(), args.dtype or ["bfloat16"], asked)
        return
    name = "cpu_native_prompts" if args.prompts else "cpu_native"
    file = RESULTS / f"{stem_for(RESULTS, name, cpu_name())}.json"
    kept = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows = [row for row in kept if row["threads"] not in asked]
    for threads in asked:
        rows += prompts(threads) if args.prompts else measure(threads)
    about = machine() | {"instruction_set": built()}
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
