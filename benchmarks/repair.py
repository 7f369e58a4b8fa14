"""A quantized checkpoint before and after ``hf-quant repair``, beside the base on held-out text that was neither calibrated nor trained on.

    python benchmarks/repair.py FOLDER --base BASE --out OUT [--passes 3]

FOLDER may be anything that the command reads. OUT is not made again if it is there. KL in nats per token, with 95 % intervals over
documents; both rows are measured on the same tokens.
"""

import json
import os
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import click
from _results import RESULTS, write

import hf_quant as hq
from hf_quant.bench.machine import cpu_name


def row(name: str, folder: Path, base: Path, tokens: int) -> dict[str, object]:
    kl = hq.evaluate(folder, base=base, max_tokens=tokens).quality.metrics["kl"]
    return {"row": name, "kl": kl.value, "low": kl.low, "high": kl.high}


@click.command(help=__doc__)
@click.argument("folder", type=Path)
@click.option("--base", type=Path, required=True)
@click.option("--out", type=Path, required=True)
@click.option("--passes", type=int, default=4)
@click.option("--tokens", type=int, default=65536, help="Held-out tokens to measure on.")
def main(folder: Path, base: Path, out: Path, passes: int, tokens: int) -> None:
    begun = time.perf_counter()
    made = not out.is_dir()
    if made:
        hq.repair(folder, out, base=str(base), passes=passes)
    seconds = time.perf_counter() - begun
    tuned = json.loads((out / "conversion.json").read_text())["tuned"]
    scheme = json.loads((folder / "recipe.json").read_text())["scheme"] if (folder / "recipe.json").is_file() else "-"
    rows = [row("as it came", folder, base, tokens), row("repaired", out, base, tokens)]
    about = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "date": str(date.today()), "base": base.name, "scheme": scheme,
        "held_out_tokens": tokens, "tuned": tuned, **{name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    about |= {"seconds": round(seconds)} if made else {}
    file = RESULTS / "repair.json"
    runs = [*(json.loads(file.read_text()) if file.is_file() else []), {"about": about, "rows": rows}]
    lines = [*__doc__.split("\n\n")[0].splitlines(), "", *__doc__.split("\n\n")[2].splitlines()]
    for run in runs:
        lines += [
            "",
            f"## {run['about']['base']}, {run['about']['scheme']}",
            "",
            "| row | KL | 95 % interval |",
            "|---|---|---|",
        ]
        lines += [f"| {r['row']} | {r['kl']:.5f} | {r['low']:.5f}..{r['high']:.5f} |" for r in run["rows"]]
        lines += ["", str(run["about"])]
    write("repair", runs, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
