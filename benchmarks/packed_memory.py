"""Memory of packed layers beside their bytes in files, format by format, and what scales in two levels cost in time.

    python benchmarks/packed_memory.py

Weights of 1,024 x 1,024 for types of GGUF (random blocks), the checkpoints of ``tests/golden/fixtures`` for other formats, whose layers
are small. Memory is what a `QuantLinear` in bfloat16 holds on this processor: its parameters, and the layout of its kernel where
that is another. Times are of one row and one thread, weights of 4,096 x 4,096 in turns through 256 MB, medians.
"""

from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from _results import write

from hf_quant.bench.machine import cpu_name
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.gguf.blocks import BLOCKS, Block, unpack
from hf_quant.gguf.codes import tensor_of
from hf_quant.jobs.convert import open_quantized
from hf_quant.kernels import LinearSpec, prepared_tensors
from hf_quant.kernels._native.compiled import built
from hf_quant.kernels.cpu_native import CpuNative
from hf_quant.nn import QuantLinear

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "golden" / "fixtures"
N = 1024


def held(weight: QuantizedTensor) -> tuple[int, int]:
    """Bytes of the parameters of a layer before a kernel laid them out anew, and of all that it holds afterwards."""
    layer = QuantLinear.of(weight, torch.bfloat16)
    after = [*layer.parameters(), *prepared_tensors(layer._repacked.get("weight"))]
    return sum(part.nbytes for part in weight.parts().values()), sum(part.nbytes for part in after)


def block_bytes(block: Block, n: int, k: int) -> torch.Tensor:
    """Random blocks whose scales are numbers."""
    data = torch.randint(0, 256, (n, k // block.weights, block.size), dtype=torch.uint8)
    for at in (at for at in (block.d, block.dmin) if at is not None):
        data[..., at : at + 2] = (torch.rand(n, k // block.weights, 1) * 0.01 + 0.001).half().view(torch.uint8)
    return data.flatten(1)


def of_gguf() -> list[dict[str, Any]]:
    rows = []
    for name, block in BLOCKS.items():
        data = block_bytes(block, N, N)
        weight = tensor_of(unpack(data, block), block)
        rows.append(row(f"GGUF {name}", weight.scheme, data.nbytes, *held(weight)))
    return rows


def of_fixture(folder: Path) -> dict[str, Any] | None:
    """Of all layers of a checkpoint that are packed; None where there are none of two axes."""
    contents, file, stored, memory, schemes = open_quantized(folder), 0, 0, 0, set()
    for name in contents.layers:
        read = contents.read(name)
        if isinstance(read, QuantizedTensor) and read.qweight.ndim == 2:
            file += sum(contents.checkpoint.tensors[f"{name}.{local}"].nbytes for local in contents.names[name])
            parts, all_of_it = held(read)
            stored, memory = stored + parts, memory + all_of_it
            schemes.add(str(read.scheme))
    return row(folder.name, "; ".join(sorted(schemes)), file, stored, memory) if file else None


def row(name: str, scheme: Any, file: int, stored: int, memory: int) -> dict[str, Any]:
    return {"format": name, "scheme": str(scheme), "file": file, "parameters": stored, "memory": memory}


def times() -> list[dict[str, Any]]:
    """One row in two levels, and with the same scales and zero points in float32."""
    torch.set_num_threads(1)
    made = []
    for name in ("Q4_K", "Q5_K"):
        weight = tensor_of(unpack(block_bytes(BLOCKS[name], 4096, 4096), BLOCKS[name]), BLOCKS[name])
        plain = QuantizedTensor(weight.qweight, weight.scale, weight.zero_point, weight.scheme)
        spec, x, backend = (
            LinearSpec(weight.scheme, 4096, 4096, torch.bfloat16, "cpu"),
            torch.randn(1, 4096).bfloat16(),
            CpuNative(),
        )
        ways = {"two levels": weight, "float32": plain}
        copies = {way: [backend.prepare(tensor, spec) for _ in range(24)] for way, tensor in ways.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(10):
            for way, prepared in copies.items():
                for one in prepared * 4:
                    start = perf_counter()
                    backend.linear(x, one, spec)
                    seconds[way].append(perf_counter() - start)
        made.append({"scheme": name, "seconds": {way: median(each) for way, each in seconds.items()}})
    return made


def page(record: dict[str, Any]) -> str:
    lines = [
        "# Memory of packed layers beside their files", "",
        f"{record['cpu']} (level {record['level']}), {record['date']}, torch {record['torch']}; `benchmarks/packed_memory.py`.", "",
        "| format | scheme | bytes in the file | parameters / file | with the kernel's layout / file |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for r in record["rows"]:
        lines.append(
            f"| {r['format']} | {r['scheme']} | {r['file']:,} | {r['parameters'] / r['file']:.3f} | {r['memory'] / r['file']:.3f} |"
        )
    lines += [
        "",
        "One row, 4,096 x 4,096, one thread:",
        "",
        "| scheme | in two levels, ms | scales in float32, ms |",
        "|---|---|---|",
    ]
    for t in record["times"]:
        lines.append(
            f"| {t['scheme']} | {t['seconds']['two levels'] * 1e3:.2f} | {t['seconds']['float32'] * 1e3:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    torch.manual_seed(0)
    fixtures = [
        made
        for folder in sorted(FIXTURES.iterdir())
        if (folder / "config.json").is_file() and (made := of_fixture(folder))
    ]
    record = {
        "cpu": cpu_name(), "level": built(), "date": date.today().isoformat(), "torch": torch.__version__,
        "rows": of_gguf() + fixtures, "times": times(),
    }  # fmt: skip
    write("packed_memory", record, page(record))
    print(page(record))


if __name__ == "__main__":
    main()
