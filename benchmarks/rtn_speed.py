"""Seconds that rounding to nearest takes for a billion weights on one core, by instruction set, beside PyTorch's operations.

    python benchmarks/rtn_speed.py

Rounds one bf16 weight of 1024 x 4096 with one thread; the ways take turns. Seconds are those of the processor, which other programs
on the machine change little; medians. ``layout`` is what it takes to lay the codes out for the compiled product, and ``undecided``
the share of groups whose scale is left to PyTorch. All ways give the same bytes, or the script ends.
"""

import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from _results import write
from torch import Tensor

from hf_quant.bench.machine import cpu_name
from hf_quant.core.numerics import same_bits
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels import LinearSpec
from hf_quant.kernels._native import compiled, rounding
from hf_quant.methods import method

N, K, TURNS = 1024, 4096, 5
SCHEMES = (
    "W4A16-g128", "W4A16-g128-asym", "W4A16-g64", "W4A16-g32", "W4A16-g16", "W3A16-g128", "W2A16-g64-asym", "W8A16-g128", "W8A8",
)  # fmt: skip
LEVELS = [level for level in compiled.LEVELS if level in ("portable", "avx2", "avx512", "dotprod")]
RTN = method("rtn")


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time for a billion weights, and the result."""
    start = time.process_time()
    result = run()
    return (time.process_time() - start) / (N * K) * 1e9, result


def by_pytorch(run: Callable[[], QuantizedTensor]) -> QuantizedTensor:
    module, compiled._cpu = compiled._cpu, None
    try:
        return run()
    finally:
        compiled._cpu = module


def measure(slug: str, weight: Tensor, best: str) -> dict[str, Any]:
    scheme = QuantScheme.parse(slug).fitted(K)
    spec, times, results = LinearSpec(scheme, N, K, weight.dtype, "cpu"), {}, {}

    def run() -> QuantizedTensor:
        return RTN.quantize(weight, scheme, weight.dtype)

    for turn in range(TURNS + 1):  # the first one warms up
        for level in LEVELS[: LEVELS.index(best) + 1]:
            compiled._cpu.limit(level)
            spent, results[level] = seconds(run)
            times.setdefault(level, []).append(spent)
        times.setdefault("layout", []).append(seconds(lambda: compiled.laid_out(results[best], spec))[0])
        if turn % 2 == 0:
            spent, results["pytorch"] = seconds(lambda: by_pytorch(run))
            times.setdefault("pytorch", []).append(spent)
    parts = [result.parts() for result in results.values()]
    assert all(same_bits(part[name], parts[0][name]) for part in parts for name in part), slug
    groups = weight.unflatten(-1, (scheme.groups(K), -1))
    doubtful = rounding.search(groups, scheme, weight.dtype, torch.linspace(1, RTN.least, RTN.steps), None)[2]
    row = {way: round(statistics.median(spent[1:]), 2) for way, spent in times.items()}
    return {"scheme": slug, **row, "undecided": round(float(doubtful.float().mean()), 6)}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight, built = (torch.randn(N, K) * 0.02).bfloat16(), compiled.built()
    assert built is not None, compiled.why_not_built()
    best = max(
        (level for level in LEVELS if compiled.LEVELS.index(level) <= compiled.LEVELS.index(built)), key=LEVELS.index
    )
    about = {"cpu": cpu_name(), "torch": torch.__version__, "date": str(date.today()), "threads": 1, "weight": [N, K]}
    rows = []
    for slug in SCHEMES:
        rows.append(measure(slug, weight, best))
        print(rows[-1], flush=True)
    names = list(rows[0])
    page = ["# Rounding to nearest: processor seconds for a billion weights on one core", "", f"{about}", ""]
    page += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    page += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    page += [
        "",
        "`undecided`: the share of groups whose two best ranges differ by the rounding of sums, which PyTorch decides.",
    ]
    page += ["`layout`: laying the codes out for the compiled product afterwards. All ways gave the same bytes."]
    write("rtn_speed", {"about": about, "rows": rows}, "\n".join(page))


if __name__ == "__main__":
    main()
