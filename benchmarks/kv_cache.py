"""Keys and values in INT8 and INT4 on the shipped model: what they cost in quality, and how much memory they leave.

    python benchmarks/kv_cache.py

The model itself stays in float32, so that nothing but the cache shows: KL to the model with a cache in floating point, nats per
token, with 95 % intervals over documents, beside what bf16 alone costs (the noise floor). Text goes through the cache 32 tokens
at a time, in windows as long as the model's context.
"""

import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from _results import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quant.data.text import read_text
from hf_quant.evaluation.cached import Cached
from hf_quant.evaluation.measure import evaluate
from hf_quant.evaluation.yardstick import Base

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "examples" / "ref-llama-16m"
TOKENS = 32768


def main() -> None:
    tokenizer, base = AutoTokenizer.from_pretrained(SHIPPED), Base(str(SHIPPED))
    reference = base.reference(tokenizer, read_text(SHIPPED / "heldout.txt"), max_tokens=TOKENS)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    rows = []
    for kind in (None, "int8", "int4"):
        measured = Cached(model, kind)
        kl = evaluate(measured, reference).metrics["kl"]
        rows.append({"cache": kind or "float32", "kl": kl.value, "low": kl.low, "high": kl.high, "noise": kl.noise,
                     "bytes": measured.nbytes})  # fmt: skip
    about = {"date": str(date.today()), "machine": platform.machine(), "tokens": TOKENS, "context": base.context()}
    about |= {name: version(name) for name in ("hf-quant", "torch", "transformers")}
    lines = [
        "# Keys and values", "", str(about), "", f"What bf16 alone costs: KL {rows[0]['noise']:.5f}.", "",
        "| cache | KL | 95 % interval | bytes of the last batch, full | of bf16 |", "|---|---|---|---|---|",
    ]  # fmt: skip
    half = rows[0]["bytes"] / 2
    for row in rows:
        share = f"{row['bytes']:,} | {row['bytes'] / half:.2f}"
        lines.append(f"| {row['cache']} | {row['kl']:.6f} | {row['low']:.6f}..{row['high']:.6f} | {share} |")
    write("kv_cache", {"about": about, "rows": rows}, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
