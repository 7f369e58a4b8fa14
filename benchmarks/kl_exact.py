"""KL divergence beside that of a script of its own: full logits of both models, log-softmax and sums in float64.

    python benchmarks/kl_exact.py [MODEL ...]

`exact` shares no code with `hf_quant.evaluation.measure`, which keeps the base's 128 likeliest tokens and a sample of the others. Both
measure the same windows of the model's heldout.txt at W8A16, W4A16, W3A16 and W2A16 (groups of 64). Without MODEL: the model
under examples/, and a tiny one that was trained until it is certain of every token (tests/yardsticks.py). Exits with 1 if they
differ by more than a hundredth.
"""

import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _results import write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quant import HfQuantConfig, load
from hf_quant.evaluation.measure import evaluate
from hf_quant.evaluation.yardstick import Base

REPO = Path(__file__).resolve().parents[1]
TOKENS = 4096


@torch.no_grad()
def exact(base, model, ids: Tensor) -> float:
    """Mean over all predictions in the windows ``ids`` ``[W, T]``, nats per token."""
    total, count = 0.0, 0
    for row in ids:
        p, q = (each(row[None]).logits[0, :-1].to(torch.float64) for each in (base, model))
        log_p, log_q = p - p.logsumexp(-1, keepdim=True), q - q.logsumexp(-1, keepdim=True)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
        count += len(log_p)
    return total / count


def rows(folder: Path, context: int, cache: Path | None = None) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    reference = Base(str(folder)).reference(
        tokenizer, text, context=context, max_tokens=TOKENS, noise=False, cache=cache
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = []
    for bits in (8, 4, 3, 2):
        model = load(str(folder), quantization_config=HfQuantConfig(f"W{bits}A16-g64"), dtype=torch.float32).eval()
        got, want = evaluate(model, reference).metrics["kl"].value, exact(base, model, reference.windows.ids)
        made.append({"model": folder.name, "bits": bits, "measured": got, "exact": want, "ratio": got / want})
    return made


def main() -> None:
    with TemporaryDirectory() as work:
        folders = [Path(name) for name in sys.argv[1:]]
        if not folders:
            sys.path.insert(0, str(REPO / "tests"))
            from yardsticks import make

            folders = [REPO / "examples" / "ref-llama-16m", make("peaked", Path(work) / "peaked")]
        found = [row for folder in folders for row in rows(folder, 64, Path(work) / "cache")]
    lines = ["# KL against full logits in float64", "", f"{date.today()}, torch {version('torch')}, transformers "
             f"{version('transformers')}; {TOKENS} tokens in windows of 64.", "",
             "| model | bits | measured | exact | ratio |", "|---|---:|---:|---:|---:|"]  # fmt: skip
    lines += [
        f"| {r['model']} | {r['bits']} | {r['measured']:.6g} | {r['exact']:.6g} | {r['ratio']:.4f} |" for r in found
    ]
    print("\n".join(lines))
    write("kl_exact", {"date": str(date.today()), "torch": version("torch"), "rows": found}, "\n".join(lines))
    sys.exit(0 if all(abs(row["ratio"] - 1) <= 0.01 for row in found) else 1)


if __name__ == "__main__":
    main()
