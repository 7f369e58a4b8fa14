"""How long `from_pretrained` takes for a packed model, beside reading its file.

    python benchmarks/loading.py --work WORK

Makes a Llama of a billion weights with random numbers, quantizes it, and then reads the file and loads the model in turn, both from
the page cache. Medians, on a quiet machine; every row in a process of its own. What is read lies in memory afterwards, as the model
does. Rows that are measured again (--scheme) take the place of theirs in the results that are committed.

With HF_QUANT_LARGE_PAGES=0 the model lies in small pages, as what is read does; by default in large ones, which the system may take
long to give where it is a virtual machine that returned its free memory to its host. Both are measured.
"""

import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from _results import RESULTS, write
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_quant as hq
from hf_quant.bench.machine import cpu_name

ROWS = (
    ("W4A16-g128", "auto"), ("W4A16-g128", "gptq"), ("W4A16-g128-asym", "awq"), ("W3A16-g128", "auto"),
    ("W8A16-g128", "auto"), ("W8A8", "auto"),
)  # fmt: skip
TURNS = 9
PAGES = {"1": "large", "0": "small"}  # HF_QUANT_LARGE_PAGES
HEAD = "| scheme | format | GB | pages | threads | reading | from_pretrained | ratio | seconds of the processor |"


def seconds(turn: Any) -> tuple[float, float]:
    """By the clock, and of the processor."""
    gc.collect()
    clock, processor = time.perf_counter(), time.process_time()
    kept = turn()
    spent = time.perf_counter() - clock, time.process_time() - processor
    del kept
    return spent


def measure(folder: Path) -> dict[str, Any]:
    transformers.utils.logging.disable_progress_bar()
    files = list(folder.glob("*.safetensors"))
    reading, loading = [], []
    for _ in range(TURNS + 1):  # the first one warms up
        reading.append(seconds(lambda: [file.read_bytes() for file in files])[0])
        loading.append(seconds(lambda: AutoModelForCausalLM.from_pretrained(folder)))
    read, (load, processor) = statistics.median(reading[1:]), map(statistics.median, zip(*loading[1:], strict=True))
    size = sum(file.stat().st_size for file in files) / 1e9
    return {
        "gb": round(size, 2),
        "reading": round(read, 3),
        "loading": round(load, 3),
        "processor": round(processor, 3),
    }


def make_base(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def make(base: Path, scheme: str, kind: str, out: Path) -> None:
    if kind == "auto":
        hq.quantize(str(base), str(out), scheme=scheme, eval=False)
        return
    packed = out.with_name(f"{scheme}-auto")
    if not packed.is_dir():
        make(base, scheme, "auto", packed)
    hq.convert(str(packed), str(out), to=kind)


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['scheme']} | {row['format']} | {row['gb']} | {row['pages']} | {row['threads']} | {row['reading']:.2f} s | {row['loading']:.2f} s | "
        f"{row['loading'] / row['reading']:.2f}x | {row['processor']:.2f} |"
    )


@click.command(help=__doc__)
@click.option("--work", type=Path, required=True, help="Folder for the models.")
@click.option("--scheme", multiple=True, help="Only these.")
@click.option("--folder", type=Path, hidden=True, help="Measure this one in this process.")
def main(work: Path, scheme: tuple[str, ...], folder: Path | None) -> None:
    if folder is not None:
        print(json.dumps(measure(folder)))
        return
    base, file = work / "base", RESULTS / "loading.json"
    if not base.is_dir():
        make_base(base)
    before = json.loads(file.read_text())["rows"] if scheme and file.is_file() else []
    rows = {(row["scheme"], row["format"], row["pages"], row["threads"]): row for row in before}
    for name, kind in [row for row in ROWS if not scheme or row[0] in scheme]:
        out = work / f"{name}-{kind}"
        if not out.is_dir():
            make(base, name, kind, out)
        for large, threads in itertools.product(PAGES, (1, 2)):
            command = [sys.executable, __file__, "--work", str(work), "--folder", str(out)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_QUANT_LARGE_PAGES": large}
            said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            row = {"scheme": name, "format": kind, "pages": PAGES[large], "threads": threads}
            row |= json.loads(said.splitlines()[-1])
            rows[name, kind, PAGES[large], threads] = row
            print(line(row), flush=True)
    about = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "date": str(date.today()), "turns": TURNS,
        **{name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    page = [
        *__doc__.split("\n\n")[0].splitlines(),
        "",
        *"\n\n".join(__doc__.split("\n\n")[2:]).splitlines(),
        "",
        str(about),
        "",
        HEAD,
    ]
    lines = [*page, "|---" * HEAD.count(" | ") + "|---|", *map(line, rows.values())]
    write("loading", {"about": about, "rows": list(rows.values())}, "\n".join(lines))


if __name__ == "__main__":
    main()
