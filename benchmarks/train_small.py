"""A small model like Qwen3 or GPT-2, trained for some minutes of one core; its rows are multiples of 256, as K-quants need.

    python benchmarks/train_small.py TEXT OUT --like qwen3 --layers 4 --minutes 5

TEXT is a UTF-8 file; documents that share a paragraph with the texts that are calibrated or measured on are left out. The tokenizer
and those texts, calibration.txt and heldout.txt, are those of the shipped model.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import time
from pathlib import Path

import torch
import transformers

from hf_quant.data.text import SEPARATOR, paragraphs, read_text, split

SHIPPED = Path(__file__).parents[1] / "examples" / "ref-llama-16m"
LIKE = {
    "qwen3": (
        transformers.Qwen3Config,
        {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "max_position_embeddings": 1024, "tie_word_embeddings": True},
    ),
    "gpt2": (
        transformers.GPT2Config,
        {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 1024,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}  # fmt: skip
BATCH, LENGTH, WARM = 8, 256, 20
RATES = {"matrices": 0.02, "rest": 3e-3}  # of Muon, https://kellerjordan.github.io/posts/muon, and of AdamW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", choices=LIKE, default="qwen3", help="the architecture")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder")
    parser.add_argument("--minutes", type=float, default=5, help="of the processor's time")
    parser.add_argument("--characters", type=int, default=8_000_000, help="of TEXT that are used")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    ids = torch.tensor(tokenizer(text_of(options.text, options.characters)).input_ids)
    architecture, shape = LIKE[options.like]
    config = architecture(
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, num_hidden_layers=options.layers, **shape
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    steps = train(model, ids, options.minutes * 60)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    for name in ("calibration.txt", "heldout.txt"):
        shutil.copy(SHIPPED / name, options.out / name)
    (options.out / "train.json").write_text(json.dumps({"minutes": options.minutes, "steps": steps}) + "\n")


def text_of(file: Path, characters: int) -> str:
    """The documents among the first ``characters`` that have nothing in common with what is calibrated or measured on."""
    with file.open(encoding="utf-8") as lines:
        documents = split(lines.read(characters))
    known = paragraphs(read_text(SHIPPED / "calibration.txt")) | paragraphs(read_text(SHIPPED / "heldout.txt"))
    return SEPARATOR.join(document for document in documents if not paragraphs(document) & known)


def train(model: transformers.PreTrainedModel, ids: torch.Tensor, seconds: float) -> int:
    """Train for that long; the learning rate falls with the time that is left. Returns the number of steps."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and re.search(r"\.(layers|h)\.", name)]
    rest = [p for p in model.parameters() if all(p is not other for other in matrices)]
    optimizers = (
        torch.optim.Muon(matrices, lr=RATES["matrices"], weight_decay=0.01),
        torch.optim.AdamW(rest, lr=RATES["rest"], betas=(0.9, 0.95)),
    )
    draw, begun, step = torch.Generator().manual_seed(0), time.process_time(), 0
    while (past := (time.process_time() - begun) / seconds) < 1:
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=draw)
        batch = torch.stack([ids[at : at + LENGTH] for at in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min(1, (step + 1) / WARM) * (0.05 + 0.475 * (1 + math.cos(math.pi * past)))
        for optimizer, rate in zip(optimizers, RATES.values(), strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            print(f"step {step}, {past:.1%} of the time, loss {loss.item():.3f}", flush=True)
    return step


if __name__ == "__main__":
    main()
