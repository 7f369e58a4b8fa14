"""Calibrated K-quants beside ``llama-quantize --imatrix``: the same types, bytes and calibration text, KL by ``llama-perplexity``.

    python benchmarks/gguf_kquants.py BUILD                      # the shipped model, its rows padded to multiples of 256
    python benchmarks/gguf_kquants.py BUILD --model FOLDER       # another one, such as that of train_small.py

BUILD is the folder ``build`` of a llama.cpp that was built with its tools. The folder of the model holds calibration.txt and
heldout.txt. Embeddings and the output head stay in float32 in all files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf_llamacpp as llamacpp
import torch
import transformers
from _results import RESULTS, write

from hf_quant import HfQuantConfig
from hf_quant.bench.machine import cpu_name
from hf_quant.jobs.convert import convert

FILES = {
    "Q2_K": "Q2_K",
    "Q3_K": "Q3_K_S",
    "Q4_K": "Q4_K_S",
    "Q5_K": "Q5_K_S",
    "Q6_K": "Q6_K",
}  # with --pure, all one type
CONTEXT = 512


def padded(source: Path, out: Path) -> None:
    """The shipped model with zeros beside its 384 columns, so that all rows are multiples of 256; it computes the same."""
    old = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wide, narrow, head = 512, old.config.hidden_size, old.config.head_dim
    config = transformers.LlamaConfig.from_pretrained(source)
    config.update(
        {"hidden_size": wide, "num_attention_heads": wide // head, "rms_norm_eps": config.rms_norm_eps * narrow / wide}
    )
    new = transformers.LlamaForCausalLM(config).float()
    each, per = (
        old.config.num_attention_heads // config.num_key_value_heads,
        wide // head // config.num_key_value_heads,
    )
    rows = (
        torch.arange(narrow) + (torch.arange(narrow) // (each * head)) * (per - each) * head
    )  # a head without use in each group
    for (name, target), weight in zip(new.named_parameters(), old.parameters(), strict=True):
        made = torch.zeros_like(target)
        if target.ndim == 1:
            made[:narrow] = weight * (narrow / wide) ** 0.5
        elif name.endswith(("q_proj.weight", "o_proj.weight")):
            place = torch.zeros_like(made)
            place[: weight.shape[0], : weight.shape[1]] = weight
            index = (rows, slice(None)) if "q_proj" in name else (slice(None), rows)
            made[index] = place[:narrow] if "q_proj" in name else place[:, :narrow]
        else:
            made[: weight.shape[0], : weight.shape[1]] = weight
        target.data.copy_(made)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = torch.tensor([tokenizer("The kernel allocates pages, and a function returns the number of them.").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(new(ids).logits, old(ids).logits, rtol=1e-4, atol=1e-3)
    new.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name in ("calibration.txt", "heldout.txt"):
        (out / name).write_bytes((source / name).read_bytes())


def ours(model: Path, work: Path, scheme: str, method: str, text: Path, tokens: int) -> tuple[Path, float]:
    """A GGUF file in a scheme, and the seconds that quantizing took."""
    begun, folder = time.monotonic(), work / f"{scheme}-{method}"
    how: dict[str, Any] = {} if method == "rtn" else {"calibration": str(text), "calibration_tokens": tokens}
    config = HfQuantConfig(scheme, method=method, **how)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=torch.float32
    )
    seconds = time.monotonic() - begun
    quantized.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    convert(folder, work / f"{folder.name}-gguf", to="gguf")
    return work / f"{folder.name}-gguf" / "model.gguf", seconds


def contents(file: Path) -> dict[str, tuple[str, int]]:
    """Type and bytes of every tensor."""
    import gguf

    return {t.name: (t.tensor_type.name, int(t.n_bytes)) for t in gguf.GGUFReader(file).tensors}


def measured(options: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """KL of all files of one model, given after every type."""
    build, model = options.build.resolve(), options.model
    if model is None:
        model = work / "padded"
        padded(llamacpp.MODEL, model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    calibration, heldout = work / "calibration.txt", work / "heldout.txt"
    for source, target, tokens in ((model / "calibration.txt", calibration, options.tokens + 64),
                                   (model / "heldout.txt", heldout, (options.chunks + 1) * CONTEXT)):  # fmt: skip
        text = source.read_text(encoding="utf-8")[: 8 * tokens]
        target.write_text(tokenizer.decode(tokenizer(text).input_ids[:tokens]), encoding="utf-8")
    plain, base, matrix = work / "float.gguf", work / "base.kld", work / "imatrix.gguf"
    simple, _ = ours(model, work, options.schemes[0], "rtn", calibration, options.tokens)
    llamacpp.float_file(simple, plain, model)
    llamacpp.tool(build, "llama-perplexity", "-m", plain, "-f", heldout, "--kl-divergence-base", base, "-c", CONTEXT,
                  "-t", 1, "--chunks", options.chunks)  # fmt: skip
    llamacpp.tool(build, "llama-imatrix", "-m", plain, "-f", calibration, "-o", matrix, "-c", CONTEXT, "-t", 1)
    record: dict[str, Any] = {}
    for scheme in options.schemes:
        rows, size = record.setdefault(scheme, {}), None
        for name, more in {"llama-quantize --imatrix": ("--imatrix", matrix), "llama-quantize": ()}.items():
            file = work / f"{scheme}{len(more)}.gguf"
            llamacpp.tool(build, "llama-quantize", *more, "--pure", "--token-embedding-type", "f32", "--output-tensor-type", "f32",
                          plain, file, FILES[scheme], 1)  # fmt: skip
            size = contents(file)
            rows[name] = llamacpp.kl_of(build, base, file, heldout)
        for method in options.methods:
            file, seconds = ours(model, work, scheme, method, calibration, options.tokens)
            if contents(file) != size:
                raise SystemExit(
                    f"{scheme}: other types or bytes: {set(contents(file).items()) ^ set((size or {}).items())}"
                )
            rows[f"hf-quant --method {method}"] = llamacpp.kl_of(build, base, file, heldout) | {"seconds": seconds}
        print(scheme, {name: row["mean_kl"] for name, row in rows.items()}, flush=True)
        yield record


def page(records: dict[str, Any]) -> str:
    """For people."""
    lines = ["# K-quants beside llama-quantize", "", "`python benchmarks/gguf_kquants.py BUILD`: KL to the float file by "
             "`llama-perplexity --kl-divergence`; all rows of a type have the same types and bytes for every tensor, and look at the "
             "same calibration text. `--pure`; embeddings and the head in float32. qwen3-256 is the model of `benchmarks/train_small.py`, "
             "trained for five minutes of one core."]  # fmt: skip
    for model, record in records.items():
        lines += ["", f"## {model}", "", f"{record['calibration tokens']} tokens of calibration text, {record['chunks']} windows of "
                  f"{CONTEXT} held-out tokens; on one core of {record['processor']}, {record['date']}; "
                  + ", ".join(f"{name} {number}" for name, number in record["versions"].items()), "",
                  "| type | file | KL | of that with imatrix |", "|---|---|---|---|"]  # fmt: skip
        for scheme, rows in record["KL"].items():
            yardstick = rows["llama-quantize --imatrix"]["mean_kl"]
            lines += [f"| {scheme} | {name} | {row['mean_kl']:.5f} ± {row['error']:.5f} | {row['mean_kl'] / yardstick:.3f} |"
                      for name, row in rows.items()]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--schemes", nargs="+", default=["Q4_K", "Q3_K", "Q2_K"], choices=FILES)
    parser.add_argument("--methods", nargs="+", default=["calibrated", "gptq"])
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration text")
    parser.add_argument("--chunks", type=int, default=16, help=f"windows of {CONTEXT} tokens that KL is measured on")
    options = parser.parse_args()
    llamacpp.find_binding(options.build.resolve())
    llamacpp.binding()  # before anything is measured

    name = (
        options.model.name if options.model else f"{llamacpp.MODEL.name}, rows padded with zeros to multiples of 256"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for kl in measured(options, Path(temporary)):
            save(name, options, kl)


def save(name: str, options: argparse.Namespace, kl: dict[str, Any]) -> None:
    """Beside what other runs have measured."""
    file = RESULTS / "gguf_kquants.json"
    records = json.loads(file.read_text()) if file.is_file() else {}
    records[name] = {
        "date": str(date.today()), "processor": cpu_name(), "chunks": options.chunks, "calibration tokens": options.tokens,
        "versions": {package: version(package) for package in ("torch", "transformers", "gguf")} | {"llama.cpp": llamacpp.binding()},
        "KL": records.get(name, {}).get("KL", {}) | kl,
    }  # fmt: skip
    write("gguf_kquants", records, page(records))


if __name__ == "__main__":
    main()
