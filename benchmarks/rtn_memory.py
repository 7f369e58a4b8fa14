"""Peak anonymous memory of quantizing while loading, beside the size of the result.

    python benchmarks/rtn_memory.py

Makes a dense Llama and a Qwen3-MoE of about 400 MB in bf16 (random weights, 100 MB shards), then loads each in a fresh
process while a thread reads RssAnon every 2 ms. Target: peak over the process before loading <= quantized size + 60 MB.
"""

import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from _results import write

SCHEMES = ("W8A16-g64", "W4A16-g64", "W3A16-g64-asym")
LIMIT = 60


def make(folder: Path, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    if kind == "dense":
        config = LlamaConfig(
            vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=512, tie_word_embeddings=False,
        )  # fmt: skip
    else:
        config = Qwen3MoeConfig(
            vocab_size=4096, hidden_size=512, intermediate_size=512, moe_intermediate_size=512, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=8, head_dim=64, num_experts=32, num_experts_per_tok=2,
            max_position_embeddings=512,
        )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")


def anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def measure(folder: str, scheme: str) -> None:
    import accelerate.hooks  # noqa: F401  (imported before the baseline is taken, like the two models below)
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    from transformers import AutoModelForCausalLM

    from hf_quant import HfQuantConfig

    torch.set_num_threads(2)
    config, peak, done = HfQuantConfig(scheme), [0.0], threading.Event()
    base = anonymous_mb()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_mb())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    plan = model.hf_quantizer.plan
    row = {
        "float_mb": plan.bytes_float / 2**20,
        "quantized_mb": plan.bytes_quantized / 2**20,
        "peak_mb": peak[0] - base,
        "steady_mb": anonymous_mb() - base,
        "seconds": seconds,
    }
    sys.stdout.write(json.dumps(row))


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for kind in ("dense", "moe"):
            folder = Path(root) / kind
            make(folder, kind)
            for scheme in SCHEMES:
                call = [sys.executable, __file__, str(folder), scheme]
                done = subprocess.run(call, capture_output=True, text=True, check=True)
                row = {"model": kind, "scheme": scheme, **json.loads(done.stdout)}
                row["over_mb"] = row["peak_mb"] - row["quantized_mb"]
                rows.append(row)
                print({k: round(v) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    names = ("torch", "transformers", "accelerate", "safetensors")
    about = {"machine": platform.processor() or platform.machine(), "date": str(date.today())}
    about |= {name: version(name) for name in names}
    table = ["| model | scheme | bf16 MB | quantized MB | peak MB | over | seconds |", "|---|---|---|---|---|---|---|"]
    table += [
        f"| {r['model']} | {r['scheme']} | {r['float_mb']:.0f} | {r['quantized_mb']:.0f} | {r['peak_mb']:.0f} "
        f"| {r['over_mb']:+.0f} | {r['seconds']:.1f} |"
        for r in rows
    ]
    write("rtn_memory", {"about": about, "rows": rows}, "\n".join([f"{about}", "", *table]))
    missed = [r for r in rows if r["over_mb"] > LIMIT]
    print(f"{len(rows) - len(missed)} of {len(rows)} within quantized size + {LIMIT} MB")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) == 3 else main()
