"""The table of formats: written, read, run, and proved by whom; from the formats themselves and the fixtures of the tests.

    python benchmarks/format_table.py        writes results/format_table.md

A fixture counts as proof of reading if every weight of it equals, to the last bit, what the project that wrote it dequantizes; that is
compared here once more. What a format holds is asked of it, scheme by scheme.
"""

from __future__ import annotations

import hashlib
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _results import write

from hf_quant.core.scheme import BITS, QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.formats import format_of, formats
from hf_quant.gguf.codes import why_not
from hf_quant.jobs.convert import open_quantized

FIXTURES = Path(__file__).parents[1] / "tests" / "golden" / "fixtures"
ELSEWHERE = {  # proofs that are not fixtures: what is compared, and by whom
    "compressed_tensors": "its own decompressor reads ours in 2, 3, 4 and 8 bits (tests/golden/test_compressed_tensors.py); vLLM runs it",
    "gguf": "the package gguf and llama.cpp (tests/golden/test_gguf.py, gguf_llamacpp.py)",
    "mlx": "mlx multiplies ours (tests/golden/test_mlx.py, where mlx is installed)",
    "native": "its own bytes are pinned (tests/golden/test_native.py)",
}


def held(reason: Any) -> str:
    """The integer schemes that a format can be written with: widths, zero points, INT8 activations."""
    widths = [str(b) for b in BITS if any(reason(QuantScheme(b, 32, s)) is None for s in (True, False))]
    if not widths:
        return "-"
    zeros = any(reason(QuantScheme(b, 32, False)) is None for b in BITS)
    inputs = any(reason(QuantScheme(b, g, activations="token")) is None for b, g in product(BITS, (32, -1)))
    return f"{', '.join(widths)} bits" + (", zero points" if zeros else "") + (", INT8 activations" if inputs else "")


def sha256(weight: torch.Tensor) -> str:
    return hashlib.sha256((weight + 0.0).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def proved(name: str) -> tuple[str, str, bool, int]:
    """Format of a fixture, who wrote it, whether it runs as codes, and how many weights are equal; stops at one that is not."""
    facts, contents = json.loads((FIXTURES / name / "expected.json").read_text()), open_quantized(FIXTURES / name)
    packed = False
    for layer, weight in facts["layers"].items():
        read, dtype = contents.read(layer), getattr(torch, weight["dtype"])
        dense = read.dequantize(dtype) if isinstance(read, QuantizedTensor) else read.to(dtype)
        if sha256(dense) != weight["sha256"]:
            raise SystemExit(f"{name}: {layer} differs")
        packed |= isinstance(read, QuantizedTensor)
    maker = next((f"{p} {v}" for p, v in facts["made_by"].items() if p != "torch"), "")
    return contents.format, maker, packed, len(facts["layers"])


def main() -> None:
    made: dict[str, list[tuple[str, bool, int]]] = {}
    for folder in sorted(FIXTURES.iterdir()):
        fmt, maker, packed, weights = proved(folder.name)
        made.setdefault(fmt, []).append((maker, packed, weights))
    rows = {}
    for name, fmt in formats().items():
        mine = made.get(name, [])
        rows[name] = {
            "written": held(fmt.why_not) if fmt.saved or fmt.converted_to else "-",
            "read": sum(weights for *_, weights in mine),
            "fixtures": len(mine),
            "run": " and ".join(dict.fromkeys("as codes" if packed else "dequantized" for _, packed, _ in mine))
            or "as codes",
            "by": ", ".join(dict.fromkeys(maker for maker, *_ in mine)),
            "else": ELSEWHERE.get(name, ""),
        }
    rows["gguf"] = {
        "written": held(why_not),
        "read": 0,
        "fixtures": 0,
        "run": "as codes, after convert",
        "by": "",
        "else": ELSEWHERE["gguf"],
    }
    assert format_of({"quant_method": "mlx", "bits": 4, "group_size": 64})[0] == "mlx"
    lines = ["# Formats: written, read, run, and proved by whom", "", "`python benchmarks/format_table.py`", "",
             "| format | written | runs | weights equal to the writer's own, bit for bit | written by | besides |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in rows.items():
        equal = f"{row['read']} of {row['read']} in {row['fixtures']} checkpoints" if row["fixtures"] else "-"
        lines.append(
            f"| {name} | {row['written']} | {row['run']} | {equal} | {row['by'] or '-'} | {row['else'] or '-'} |"
        )
    write("format_table", rows, "\n".join(lines))


if __name__ == "__main__":
    main()
