"""A model of a billion random weights through transformers' ``generate``: INT4 and INT8 beside bf16, and llama.cpp on the same shapes.

    python benchmarks/decode.py [--threads 2] [--plain] [--llama-bench PROGRAM --gguf FILE ...]

Tokens a second that are generated after 128 and 1,024 others (greedy, a cache, one sequence), and of prompts of 128 and 512
tokens; each model in a process of its own, as it is and, with a static cache, after ``torch.compile`` (not with ``--plain``);
medians of several turns. llama.cpp's own ``llama-bench`` measures each FILE, a Llama of the same shapes in Q4_0 or Q4_K_M.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _results import write
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_quant import HfQuantConfig
from hf_quant.bench.machine import cpu_name
from hf_quant.kernels._native.compiled import built

SHAPES = LlamaConfig(
    hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
PROMPTS, DEPTHS, NEW, TURNS = (128, 512), (128, 1024), 48, 3
MODELS = ("bf16", "W4A16-g128", "W4A16-g32", "W4A8-g128", "W8A16-g128", "W8A8")


def decode(depth: int) -> str:
    return f"decode after {depth:,}"


def prompt(length: int) -> str:
    return f"prompt of {length}"


WHAT = (*map(decode, DEPTHS), *map(prompt, PROMPTS))


def seconds(model: Any, length: int, new: int, **how: Any) -> float:
    """For a prompt of ``length`` tokens and ``new`` more."""
    ids = torch.randint(0, 32000, (1, length))
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **how)
    return time.perf_counter() - start


def measure(model: Any, **how: Any) -> dict[str, float]:
    times: dict[str, list[float]] = {what: [] for what in WHAT}
    how |= {"do_sample": False, "pad_token_id": 0}
    for _ in range(TURNS + 1):
        firsts = {length: seconds(model, length, 1, **how) for length in {*PROMPTS, *DEPTHS}}
        for length in PROMPTS:
            times[prompt(length)].append(firsts[length] / length)
        for depth in DEPTHS:
            times[decode(depth)].append((seconds(model, depth, NEW + 1, **how) - firsts[depth]) / NEW)
    return {what: 1 / statistics.median(each[1:]) for what, each in times.items()}


def both(folder: Path, name: str, plain: bool) -> dict[str, dict[str, float]]:
    """One model, as it is and, unless ``plain``, compiled."""
    config = {} if name == "bf16" else {"quantization_config": HfQuantConfig(name, quantize_lm_head=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **config).eval()
    model.generation_config.eos_token_id = None  # random weights may end a text at any time
    found = {name: measure(model)}
    if plain:
        return found
    model.forward = torch.compile(model.forward)
    return found | {f"{name}, torch.compile": measure(model, cache_implementation="static")}


def apart(folder: Path, name: str, threads: int, plain: bool) -> dict[str, dict[str, float]]:
    call = [sys.executable, __file__, "--threads", str(threads), "--model", name, "--folder", str(folder)]
    call += ["--plain"] * plain
    return json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout)


def llama(program: Path, file: Path, threads: int) -> dict[str, float]:
    call = [program, "-m", file, "-t", str(threads), "-r", str(TURNS), "-o", "json"]
    prompts = [*call, "-n", "0", "-p", ",".join(map(str, PROMPTS))]
    decoding = [*call, "-p", "0", "-n", str(NEW), "-d", ",".join(map(str, DEPTHS))]
    rows = [
        row
        for each in (prompts, decoding)
        for row in json.loads(subprocess.run(each, capture_output=True, text=True, check=True).stdout)
    ]
    return {prompt(row["n_prompt"]) if row["n_prompt"] else decode(row["n_depth"]): row["avg_ts"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--gguf", type=Path, action="append", default=[])
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--model", choices=MODELS, help="this one alone, out of --folder, to standard output")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.model:
        print(json.dumps(both(asked.folder, asked.model, asked.plain)))
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(SHAPES, dtype=torch.bfloat16).save_pretrained(folder)
        gc.collect()
        for name in MODELS:
            found |= apart(Path(folder), name, asked.threads, asked.plain)
    for file in asked.gguf if asked.llama_bench else []:
        found[f"llama.cpp {file.stem}"] = llama(asked.llama_bench, file, asked.threads)
    about = {
        "cpu": cpu_name(), "threads": asked.threads, "instruction_set": built(), "torch": version("torch"),
        "transformers": version("transformers"), "date": str(date.today()),
    }  # fmt: skip
    lines = ["# A billion weights through generate", "", str(about), "",
             "| tokens/s | " + " | ".join(f"{what} | over bf16" for what in WHAT) + " |", "|---" * (1 + 2 * len(WHAT)) + "|"]  # fmt: skip
    for name, each in found.items():
        over = [f"{each[what]:.1f} | {each[what] / found['bf16'][what]:.2f}x" for what in WHAT]
        lines.append(f"| {name} | {' | '.join(over)} |")
    write("decode", {"about": about, "found": found}, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
