"""Whether outliers in floating point are worth their bytes, and what calibration recovers where channels are extreme.

    python benchmarks/outliers.py [--work FOLDER]

Equal bytes: KL of GPTQ at 3 and 2 bits, plain, with 0.1 % outliers of both kinds, and with groups half as large, beside the
bytes each adds; KL saved per kilobyte tells which is the better use. Recovery: on the variant of the shipped model whose
channels were rescaled (`outlier_variant.py`), the share of the KL of rounding that calibrated, outlier-aware quantization takes
away. Same calibration tokens and held-out text everywhere; one ``hf-quant quantize`` a row, whose results are kept in WORK.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _results import write
from outlier_variant import make

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "examples" / "ref-llama-16m"
BYTES = {
    "W3": ("W3A16-g128", "W3A16-g128-o0.1%", "W3A16-g128-o0.1%-columns", "W3A16-g64"),
    "W2": ("W2A16-g64-asym", "W2A16-g64-asym-o0.1%", "W2A16-g64-asym-o0.1%-columns", "W2A16-g32-asym"),
}
RECOVERY = {
    "W4A16-g128": [
        ("clean", "rtn", ""), ("rescaled", "rtn", ""), ("rescaled", "gptq", ""), ("rescaled", "gptq", "-o0.1%-columns"),
        ("rescaled", "calibrated", ""), ("rescaled", "calibrated", "-o0.1%"), ("rescaled", "calibrated", "-o1%-columns"),
        ("rescaled", "calibrated", "-o1%"), ("rescaled", "calibrated", "-o2%"),
    ],
    "W3A16-g128": [
        ("clean", "rtn", ""), ("rescaled", "rtn", ""), ("rescaled", "calibrated", "-o0.1%"),
        ("rescaled", "calibrated", "-o1%"),
    ],
}  # fmt: skip


def row(model: Path, method: str, scheme: str, work: Path, tokens: int) -> dict[str, Any]:
    """Results of one quantization: KL with its interval, and bytes."""
    out = work / f"{model.name}-{method}-{scheme}"
    kept = work / f"{out.name}.results.json"
    if not kept.is_file():
        call = [
            sys.executable,
            "-m",
            "hf_quant.cli",
            "quantize",
            model,
            "-o",
            out,
            "--method",
            method,
            "--scheme",
            scheme,
        ]
        call += ["--max-kl", "1000", "--max-tokens", tokens, "--overwrite", "-q"]
        subprocess.run([str(part) for part in call], check=True)
        kept.write_text((out / "results.json").read_text())
    found = json.loads(kept.read_text())
    kl = found["quality"]["metrics"]["kl"]
    return {
        "model": model.name, "method": method, "scheme": scheme, "bytes": found["bytes"], "kl": kl["value"],
        "low": kl["low"], "high": kl["high"], "seconds": found["seconds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=32768, help="measured")
    asked = parser.parse_args()
    work = asked.work or Path(tempfile.mkdtemp())
    rescaled = work / "rescaled"
    if not rescaled.is_dir():
        make(SHIPPED, rescaled)
    lines, record = [], {"equal_bytes": [], "recovery": []}
    for bits, schemes in BYTES.items():
        rows = [row(SHIPPED, "gptq", scheme, work, asked.tokens) for scheme in schemes]
        lines += [
            "",
            f"## {bits}",
            "",
            "| scheme | bytes more | KL | 95 % interval | KL saved per kB |",
            "|---|---|---|---|---|",
        ]
        for each in rows:
            each["more"], each["saved"] = each["bytes"] - rows[0]["bytes"], rows[0]["kl"] - each["kl"]
            rate = f"{1000 * each['saved'] / each['more']:.2e}" if each["more"] else "-"
            lines.append(
                f"| {each['scheme']} | {each['more']:,} | {each['kl']:.5f} | {each['low']:.5f}..{each['high']:.5f} | {rate} |"
            )
        record["equal_bytes"] += rows
    lines += ["", "## Channels rescaled by 30", "", "| model | method | scheme | bytes | KL | 95 % interval | of RTN's KL recovered |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for scheme, rows in RECOVERY.items():
        found = [
            row(rescaled if m != "clean" else SHIPPED, method, scheme + o, work, asked.tokens) for m, method, o in rows
        ]
        for (name, method, _), each in zip(rows, found, strict=True):
            each["recovered"] = None if method == "rtn" else 1 - each["kl"] / found[1]["kl"]
            share = "-" if method == "rtn" else f"{each['recovered']:.1%}"
            lines.append(
                f"| {name} | {method} | {each['scheme']} | {each['bytes']:,} | {each['kl']:.5f} | "
                f"{each['low']:.5f}..{each['high']:.5f} | {share} |"
            )
        record["recovery"] += found
    machine = {"cpu": platform.processor() or platform.machine(), "date": str(date.today())}
    machine |= {name: version(name) for name in ("hf-quant", "torch", "transformers")}
    text = "# Outliers\n\n" + ", ".join(f"{k} {v}" for k, v in machine.items()) + "\n" + "\n".join(lines) + "\n"
    write("outliers", {"machine": machine, **record}, text)
    print(text)


if __name__ == "__main__":
    main()
