"""GGUF files of this package in llama.cpp itself: logits, greedy tokens, and KL by its own tool beside ours.

    python benchmarks/gguf_llamacpp.py BUILD
    python benchmarks/gguf_llamacpp.py BUILD --model FOLDER    # another model, such as that of train_small.py

BUILD is the folder ``build`` of a llama.cpp that was built with its tools, for example the one inside the source package
llama-cpp-python, whose Python binding is used too (``--no-binary llama-cpp-python``; its folder is found above BUILD).

Compared are the model in ``W4A16-g32`` and ``W8A16-g32``, exported as Q4_0 and Q8_0, with the same files made F32 by
``llama-quantize``. llama.cpp rounds the inputs of quantized layers to INT8 in groups of 32, so only the F32 files can agree to float
tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from _results import RESULTS, write

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.bench.machine import cpu_name
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.gguf.architectures import gguf_name, of_config, row_order
from hf_quant.jobs.convert import convert

TYPES = {"W4A16-g32": "Q4_0", "W8A16-g32": "Q8_0"}
MODEL = Path(__file__).parents[1] / "examples" / "ref-llama-16m"
PROMPTS, LENGTH, NEW, CONTEXT, CHUNKS = 8, 64, 24, 512, 24


def tool(build: Path, name: str, *args: object) -> str:
    """Run one of llama.cpp's programs; its output."""
    run = subprocess.run([build / "bin" / name, *map(str, args)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{name} {args}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.stdout + run.stderr


def float_file(quantized: Path, out: Path, model: Path = MODEL) -> None:
    """The unquantized model with the keys and names of a quantized file."""
    import gguf

    reader, checkpoint = gguf.GGUFReader(quantized), Checkpoint.open(model)
    architecture = of_config(checkpoint.config)
    writer = gguf.GGUFWriter(out, architecture.name)
    for key, stored in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = stored.types[1] if len(stored.types) > 1 else None
            writer.add_key_value(key, stored.contents(), stored.types[0], sub_type=sub)
    for name in checkpoint.tensors:
        if name == "lm_head.weight":
            continue
        tensor, target = checkpoint.read(name).float(), gguf_name(name)
        order = row_order(target, architecture, checkpoint.config, tensor.shape[0])
        writer.add_tensor(target, (tensor if order is None else tensor[order]).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def theirs(file: Path, ids: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits at every position of the prompts, and the tokens that follow greedily."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(str(file), n_ctx=CONTEXT, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    logits, tokens = [], []
    for prompt in ids.tolist():
        model.reset()
        model.eval(prompt)
        logits.append(torch.from_numpy(np.array(model.scores[: len(prompt)])))
        made: list[int] = []
        for _ in range(NEW):
            made.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(made[-1:])
        tokens.append(made)
    return torch.stack(logits), tokens


def ours(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """The same of a checkpoint in transformers, with plain products in float32."""
    os.environ["HF_QUANT_BACKEND"] = "reference"
    model = hf_quant.load(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids).logits
        made = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return logits, made[:, ids.shape[1] :].tolist()


def compared(one: tuple[torch.Tensor, list[list[int]]], other: tuple[torch.Tensor, list[list[int]]]) -> dict[str, Any]:
    """How far two programs are apart."""
    p, q = (logits.double().log_softmax(-1) for logits, _ in (one, other))
    kl = (p.exp() * (p - q)).sum(-1)
    return {
        "largest_difference_of_logits": float((one[0] - other[0]).abs().max()),
        "largest_logit": float(one[0].abs().max()),
        "mean_kl": float(kl.mean()),
        "greedy_sequences_equal": sum(a == b for a, b in zip(one[1], other[1], strict=True)),
        "greedy_sequences": len(one[1]),
        "greedy_tokens_equal": sum(
            x == y for a, b in zip(one[1], other[1], strict=True) for x, y in zip(a, b, strict=True)
        ),
        "greedy_tokens": sum(map(len, one[1])),
    }


def kl_of(build: Path, base: Path, file: Path, text: Path) -> dict[str, float]:
    """KL of a file to the float file, by llama-perplexity."""
    log = tool(
        build, "llama-perplexity", "-m", file, "--kl-divergence-base", base, "--kl-divergence", "-c", CONTEXT, "-t", 1
    )
    found = re.search(r"Mean\s+KLD:\s+([\d.e-]+)\s+±\s+([\d.e-]+)", log)
    if found is None:
        raise SystemExit(f"no KL in {log[-2000:]}")
    return {"mean_kl": float(found[1]), "error": float(found[2]), "bytes": file.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    options = parser.parse_args()
    build = options.build.resolve()
    find_binding(build)
    with tempfile.TemporaryDirectory() as temporary:
        record = measured(build, options.model, Path(temporary))
    record = {
        "date": str(date.today()), "processor": cpu_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "gguf")} | {"llama-cpp-python": binding()},
    } | record  # fmt: skip
    file = RESULTS / "gguf_llamacpp.json"
    records = json.loads(file.read_text()) if file.is_file() else {}
    records = {name: old for name, old in records.items() if isinstance(old, dict) and "processor" in old}
    records[options.model.name] = record
    write("gguf_llamacpp", records, page(records))


def find_binding(build: Path) -> None:
    """Let the Python binding beside a build be imported."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(build / "bin")
    sys.path += [str(path.parent.parent) for path in build.parents[2].glob("llama_cpp/__init__.py")]


def binding() -> str:
    """Version of the Python binding, whose source package holds llama.cpp."""
    import llama_cpp

    return str(llama_cpp.__version__)


def page(records: dict[str, Any]) -> str:
    """For people."""
    lines = ["# GGUF files in llama.cpp", "", "`python benchmarks/gguf_llamacpp.py BUILD`: "
             f"{PROMPTS} prompts of {LENGTH} tokens, and {NEW} greedy tokens after each; ours: plain products in float32. llama.cpp keeps "
             "keys and values in float16 and rounds the inputs of quantized layers to INT8."]  # fmt: skip
    for model, record in records.items():
        lines += ["", f"## {model}", "", f"On one core of {record['processor']}, {record['date']}; "
                  + ", ".join(f"{name} {number}" for name, number in record["versions"].items()), "",
                  "| | largest difference of logits | of | mean KL | greedy tokens equal | sequences equal |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for name, row in record["logits"].items():
            lines.append(
                f"| {name} | {row['largest_difference_of_logits']:.2g} | {row['largest_logit']:.1f} | {row['mean_kl']:.2g} | "
                f"{row['greedy_tokens_equal']} of {row['greedy_tokens']} | {row['greedy_sequences_equal']} of {row['greedy_sequences']} |"
            )
        lines += ["", f"KL to the float file by `llama-perplexity --kl-divergence`, {record['chunks']} windows of {CONTEXT} held-out "
                  "tokens:", "", "| file | KL | bytes |", "|---|---|---|"]  # fmt: skip
        for name, row in record["KL by llama-perplexity"].items():
            lines.append(f"| {name} | {row['mean_kl']:.5f} ± {row['error']:.5f} | {row['bytes']:,} |")
    return "\n".join(lines)


def measured(build: Path, folder: Path, work: Path) -> dict[str, Any]:
    """Everything that is compared, of one model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    heldout = (folder / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(heldout[:40_000]).input_ids[: PROMPTS * LENGTH]).view(PROMPTS, LENGTH)
    plain, text, base = work / "float.gguf", work / "text.txt", work / "base.kld"
    text.write_text(heldout[:90_000], encoding="utf-8")
    record: dict[str, Any] = {"logits": {}, "KL by llama-perplexity": {}, "chunks": CHUNKS}
    for scheme, kind in TYPES.items():
        quantized, wide, own = work / scheme, work / f"{kind}-wide.gguf", work / f"{kind}-own.gguf"
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=HfQuantConfig(scheme), dtype=torch.float16
        )
        model.save_pretrained(quantized)
        tokenizer.save_pretrained(quantized)
        file = exported(quantized, work)
        if not plain.exists():
            float_file(file, plain, folder)
            tool(build, "llama-perplexity", "-m", plain, "-f", text, "--kl-divergence-base", base, "-c", CONTEXT, "-t", 1,
                 "--chunks", CHUNKS)  # fmt: skip
        tool(build, "llama-quantize", "--allow-requantize", file, wide, "F32", 1)
        tool(build, "llama-quantize", "--pure", "--token-embedding-type", "f32", plain, own, kind, 1)
        mine = ours(quantized, ids)
        record["logits"] |= {
            f"{kind} made F32, to ours": compared(mine, theirs(wide, ids)), f"{kind}, to ours": compared(mine, theirs(file, ids)),
        }  # fmt: skip
        record["KL by llama-perplexity"] |= {
            f"ours, rounded to {scheme}": kl_of(build, base, file, text), f"llama-quantize {kind}": kl_of(build, base, own, text),
        }  # fmt: skip
        print(record, flush=True)
    hf_quant.quantize(folder, work / "calibrated", scheme="W4A16-g32", method="calibrated", eval=False)
    record["KL by llama-perplexity"]["ours, calibrated W4A16-g32"] = kl_of(
        build, base, exported(work / "calibrated", work), text
    )
    return record


def exported(quantized: Path, work: Path) -> Path:
    """The GGUF file of a checkpoint."""
    convert(quantized, work / f"{quantized.name}-gguf", to="gguf")
    return work / f"{quantized.name}-gguf" / "model.gguf"


if __name__ == "__main__":
    main()
