"""W8A8 on this CPU beside bf16 and PyTorch's own dynamic INT8: single layers, and whole models in prefill.

    OMP_NUM_THREADS=1 python benchmarks/int8_linear.py layers
    OMP_NUM_THREADS=1 python benchmarks/int8_linear.py models

Layers take turns, so that whatever slows the machine slows all; medians, rounding of the activations included. The dynamic
linear of PyTorch (`quantized::linear_dynamic`) takes float32 and one scale for all rows; it is timed on float32 activations.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor

from hf_quant import HfQuantConfig
from hf_quant.bench.speed import compare
from hf_quant.hf import load
from hf_quant.kernels import LinearSpec, select
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import QuantizedTensor

HERE = Path(__file__).resolve().parent
SHIPPED, RESULTS = HERE.parent / "examples" / "ref-llama-16m", HERE / "results"
SHAPES = [(2048, 2048), (4096, 4096), (4096, 11008)]  # K, N
ROWS = (1, 16, 128, 512)
SECONDS = 1.0  # of turns for each cell
ROUND = ("bf16", "W8A8", "linear_dynamic", "W8A16")


def ways(k: int, n: int) -> dict[str, Callable[[int], Callable[[], Tensor]]]:
    """Name to what makes a product of so many rows."""
    codes = torch.randint(256, (n, k), dtype=torch.uint8)
    scale = torch.full((n, 1), 1e-3, dtype=torch.bfloat16)
    dense = torch.randn(n, k).bfloat16() * 0.02
    signed = torch._make_per_channel_quantized_tensor(
        (codes ^ 0x80).view(torch.int8), scale[:, 0].double(), torch.zeros(n, dtype=torch.long), 0
    )
    packed = torch.ops.quantized.linear_prepack(signed, None)

    def of(dtype: torch.dtype, product: Callable[[Tensor], Tensor]) -> Callable[[int], Callable[[], Tensor]]:
        def make(m: int) -> Callable[[], Tensor]:
            x = torch.randn(m, k).to(dtype)
            return lambda: product(x)

        return make

    def ours(slug: str) -> Callable[[int], Callable[[], Tensor]]:
        scheme = QuantScheme.parse(slug)
        spec = LinearSpec(scheme, n, k, torch.bfloat16, "cpu")
        backend = select(spec)
        prepared = backend.prepare(QuantizedTensor(codes, scale, None, scheme), spec)
        return of(torch.bfloat16, lambda x: backend.linear(x, prepared, spec))

    return {
        "bf16": of(torch.bfloat16, lambda x: F.linear(x, dense)),
        "W8A8": ours("W8A8"),
        "linear_dynamic": of(torch.float32, lambda x: torch.ops.quantized.linear_dynamic(x, packed)),
        "W8A16": ours("W8A16-g-1"),
    }


def in_turns(made: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median microseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(3):
        for run in made.values():
            run()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times["bf16"]) < 5:
        for name, run in made.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(each) for name, each in times.items()}


@torch.inference_mode()
def layers() -> list[dict[str, Any]]:
    """Every shape at every number of rows."""
    found = []
    for k, n in SHAPES:
        made = ways(k, n)
        for m in ROWS:
            found.append({"k": k, "n": n, "m": m} | in_turns({name: make(m) for name, make in made.items()}))
            print(json.dumps(found[-1]), file=sys.stderr)
    return found


def random_llama() -> Any:
    """300 million parameters."""
    config = tf.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=8192, max_position_embeddings=1024,
    )  # fmt: skip
    return tf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def models(work: Path) -> list[dict[str, Any]]:
    """Prefill and decode of two whole models, in turns with themselves in bf16."""
    found = []
    llama = work / "llama-300m"
    if not llama.exists():
        random_llama().save_pretrained(llama)
    for name, folder, prompt in (("shipped, 16M", SHIPPED, 512), ("random Llama, 300M", llama, 512)):
        both = {
            "bf16": load(str(folder), dtype=torch.bfloat16).eval(),
            "W8A8": load(str(folder), dtype=torch.bfloat16, quantization_config=HfQuantConfig("W8A8")).eval(),
        }
        speeds = compare(both, [1, 4] if "16M" in name else [1], prompt=prompt, new=4, repeats=5)
        for role, each in speeds.items():
            found += [{"model": name, "role": role} | speed.to_dict() for speed in each]
            print(json.dumps(found[-1]), file=sys.stderr)
    return found


def page(record: dict[str, Any]) -> str:
    lines = [f"{record['machine']}, {record['threads']} thread(s), torch {record['torch']}, {record['date']}."]
    if record.get("layers"):
        lines += ["", "Microseconds, and how much faster than bf16:", ""]
        lines += ["| K x N | rows | " + " | ".join(ROUND) + " |", "|---" * (len(ROUND) + 2) + "|"]
        for cell in record["layers"]:
            shown = [f"{cell[name]:.0f} ({cell['bf16'] / cell[name]:.2f}x)" for name in ROUND]
            lines.append(f"| {cell['k']} x {cell['n']} | {cell['m']} | " + " | ".join(shown) + " |")
    if record.get("models"):
        lines += [
            "",
            "| model | batch | prompt | prefill tokens/s in bf16 | in W8A8 | ratio | decode ratio |",
            "|---" * 7 + "|",
        ]
        of = {(c["model"], c["batch"], c["role"]): c for c in record["models"]}
        for (model, batch, role), ours in of.items():
            if role == "W8A8":
                base = of[model, batch, "bf16"]
                ratio, decode = ours["prefill"] / base["prefill"], ours["decode"] / base["decode"]
                lines.append(
                    f"| {model} | {batch} | {ours['prompt']} | {base['prefill']:.0f} | {ours['prefill']:.0f} | {ratio:.2f} | {decode:.2f} |"
                )
    return "# W8A8 on a CPU\n\n" + "\n".join(lines) + "\n"


def main(what: str, work: Path) -> None:
    file = RESULTS / "int8_linear.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    cpu = next(
        (x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    record |= {
        "machine": f"{cpu or platform.processor()} ({torch.backends.cpu.get_cpu_capability()}, AMX {torch.cpu._is_amx_tile_supported()})",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "date": str(date.today()),
    }  # fmt: skip
    record[what] = layers() if what == "layers" else models(work)
    file.write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "int8_linear.md").write_text(page(record))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "."))
