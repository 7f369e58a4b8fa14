"""Checkpoints of this package in vLLM on CPUs: the same greedy tokens as plain products here?

    python benchmarks/vllm_cpu.py make WORK           in an environment with this package
    python benchmarks/vllm_cpu.py run WORK PYTHON     PYTHON of an environment with vllm-cpu; writes results/vllm_cpu.md

``make`` quantizes the shipped model and writes what 32 greedy tokens follow each of 16 prompts in float32; ``run`` starts vLLM
for each scheme. vLLM's products of packed weights know 16-bit types only, so near ties may fall to the other side: for every
first difference the distance of the two best logits is given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

MODEL = Path(__file__).parents[1] / "examples" / "ref-llama-16m"
SCHEMES = {"W4A16-g32": "bfloat16", "W4A16-g32-asym": "bfloat16", "W4A8-g32": "bfloat16", "W8A8": "float32"}
PROMPTS, LENGTH, NEW = 16, 32, 32
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
         "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "", "HF_QUANT_AUTOLOAD": "0"}  # fmt: skip


def make(work: Path) -> None:
    import torch
    import transformers

    import hf_quant

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer((MODEL / "heldout.txt").read_text(encoding="utf-8")[:60_000]).input_ids
    prompts = [ids[i * 300 : i * 300 + LENGTH] for i in range(PROMPTS)]
    (work / "prompts.json").write_text(json.dumps(prompts))
    os.environ["HF_QUANT_BACKEND"] = "dequant"
    for slug in SCHEMES:
        config = hf_quant.HfQuantConfig(slug)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            MODEL, quantization_config=config, dtype=torch.bfloat16
        )
        model.save_pretrained(work / slug)
        tokenizer.save_pretrained(work / slug)
        model = hf_quant.load(str(work / slug), dtype=torch.float32).eval()
        out = model.generate(
            torch.tensor(prompts), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.stack(out.logits, 1).topk(2).values
        made = {"tokens": out.sequences[:, LENGTH:].tolist(), "gap": (best[..., 0] - best[..., 1]).tolist()}
        (work / slug / "ours.json").write_text(json.dumps(made))


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
    for slug, dtype in SCHEMES.items():
        command = [python, __file__, "one", str(work / slug), dtype]
        done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, check=True)
        theirs, ours = json.loads(done.stdout.splitlines()[-1]), json.loads((work / slug / "ours.json").read_text())
        apart = []
        for a, b, gaps in zip(theirs["tokens"], ours["tokens"], ours["gap"], strict=True):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
            apart += [] if at is None else [round(gaps[at], 3)]
        rows[slug] = {
            "dtype": dtype,
            "equal": PROMPTS - len(apart),
            "of": PROMPTS,
            "gaps": apart,
            "vllm": theirs["vllm"],
        }
    lines = [
        "# vLLM on CPUs", "",
        f"{MODEL.name}, rounded, {cpu_name()}, {date.today()}, vLLM {rows['W8A8']['vllm']}; ours in float32. `python benchmarks/vllm_cpu.py`",
        "", "| scheme | vLLM computes in | sequences of 32 greedy tokens equal | distance of the two best logits where they part |", "|---|---|---|---|",
        *(f"| {slug} | {r['dtype']} | {r['equal']} of {r['of']} | {', '.join(map(str, r['gaps'])) or '-'} |" for slug, r in rows.items()),
    ]  # fmt: skip
    write("vllm_cpu", rows, "\n".join(lines))


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    {"make": make, "one": one, "run": run}[what](Path(folder), *rest)
