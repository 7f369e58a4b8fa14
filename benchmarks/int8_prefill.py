"""Whole-model prefill with INT8 weights and activations beside bf16, on a CPU: the shipped model, and 300M random weights.

    python benchmarks/int8_prefill.py [--threads 2]

One prompt of 512 tokens, no cache, the models taking turns; medians.
"""

import argparse
import statistics
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

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "examples" / "ref-llama-16m"
TOKENS, TURNS = 512, 9
LARGE = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=8,
    vocab_size=32000, max_position_embeddings=1024,
)  # fmt: skip


def seconds(models: dict[str, Any], vocabulary: int) -> dict[str, float]:
    ids = torch.randint(0, vocabulary, (1, TOKENS))
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(TURNS + 2):
            for name, model in models.items():
                start = time.perf_counter()
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    about = {
        "cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": version("torch"), "date": str(date.today()),
        "tokens": TOKENS,
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(LARGE, dtype=torch.bfloat16).save_pretrained(folder)
        for name, source in (("shipped, 16M", SHIPPED), ("random, 300M", folder)):
            models = {"bf16": AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()}
            for slug in ("W8A8", "W4A8-g128"):
                config = HfQuantConfig(slug)
                models[slug] = AutoModelForCausalLM.from_pretrained(
                    source, dtype=torch.bfloat16, quantization_config=config
                ).eval()
            found = seconds(models, models["bf16"].config.vocab_size)
            rows.append({"model": name, "parameters": models["bf16"].num_parameters(), **found})
    lines = [
        "# Prefill of 512 tokens",
        "",
        str(about),
        "",
        "| model | bf16 ms | W8A8 ms | W4A8 ms |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[n] * 1e3:.1f} ({row['bf16'] / row[n]:.2f}x)" for n in ("bf16", "W8A8", "W4A8-g128")]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    write("int8_prefill", {"about": about, "rows": rows}, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
