"""Does the 95 % bootstrap interval cover? Random halves of the held-out documents, beside the interval of all of them.

    python benchmarks/bootstrap_coverage.py

The mean over half of the documents, drawn without replacement, scatters around the mean over all of them with the very
variance that the bootstrap estimates for the mean over all of them (the half-sample property). So if the interval is right,
95 of 100 halves fall inside it. 200 halves, all documents, W4A16-g128; KL, log of the perplexity ratio, top-1 agreement.
"""

import json
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_quant import HfQuantConfig, load
from hf_quant.evaluation import token_values
from hf_quant.evaluation.bootstrap import interval, sums
from hf_quant.evaluation.yardstick import Base
from hf_quant.text import read_text

MODEL = Path(__file__).parents[1] / "examples" / "ref-llama-16m"
RESULTS = Path(__file__).parent / "results"
HALVES = 200


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    reference = Base(str(MODEL)).reference(tokenizer, read_text(MODEL / "heldout.txt"), noise=False)
    model = load(str(MODEL), quantization_config=HfQuantConfig("W4A16-g128"), dtype=torch.float32).eval()
    values, _ = token_values(model, reference)
    document = reference.windows.document[:, 1:][reference.windows.scored]
    rows = []
    for name in ("kl", "perplexity_ratio", "top1"):
        total, count = sums(values[name], document)
        low, high = interval(total, count)
        draw = torch.Generator().manual_seed(0)
        inside = 0
        for _ in range(HALVES):
            half = torch.randperm(len(total), generator=draw)[: len(total) // 2]
            inside += low <= (total[half].sum() / count[half].sum()).item() <= high
        rows.append({"metric": name, "low": low, "high": high, "inside": inside / HALVES})
        print(rows[-1], flush=True)
    about = {"documents": len(total), "tokens": len(document), "halves": HALVES, "date": str(date.today())}
    about |= {name: version(name) for name in ("torch", "transformers")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bootstrap_coverage.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    sys.exit(0 if all(0.93 <= row["inside"] <= 0.97 for row in rows) else 1)


if __name__ == "__main__":
    main()
