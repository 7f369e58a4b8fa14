"""Checkpoints of other programs, run packed, beside what those programs' own dequantizers give.

    python benchmarks/formats.py [FOLDER...]      default: the golden fixtures; more folders as make_fixtures.py makes them

For each: does it load; how many of its weights are bit for bit those of the original's own dequantizer; the largest
difference of a logit to the float model that holds the weights as we read them (the same bits where that column says all),
with the plain kernel in the dtype of the original's dequantizer and with the kernel chosen for this machine; the same
with the logits that were computed beside the fixture; and the memory of the loaded model over the size of the file, with
portable codes and as the chosen kernels lay them out. Nothing of the original packages is imported.
"""

import hashlib
import json
import logging
import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from _results import write
from safetensors.torch import load_file

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.bench.memory import weight_bytes
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.jobs.convert import open_quantized

FIXTURES = Path(__file__).parents[1] / "tests" / "golden" / "fixtures"
IDS = torch.arange(1, 17)[None]
HEAD = ("checkpoint", "model", "format", "layers", "identical weights", "max logit diff", "chosen kernel", "stored logits",
        "memory / file", "chosen kernel's")  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def load(folder, backend, dtype):
    os.environ.pop("HF_QUANT_BACKEND", None)
    if backend:
        os.environ["HF_QUANT_BACKEND"] = backend
    exact = HfQuantConfig(activations="float") if backend == "reference" else HfQuantConfig()
    return hf_quant.load(str(folder), dtype=dtype, attn_implementation="eager", quantization_config=exact)


def memory(model):
    """Bytes of the model, without what no file holds."""
    return weight_bytes(model) - sum(buffer.nbytes for name, buffer in model.named_buffers() if "rotary" in name)


def identical(contents, facts):
    """How many weights have the SHA-256 that the original's dequantizer gave."""
    count = 0
    for layer, weight in facts["layers"].items():
        read, dtype = contents.read(layer), getattr(torch, weight["dtype"])
        ours = read.dequantize(dtype) if isinstance(read, QuantizedTensor) else read.to(dtype)
        raw = (ours + 0.0).contiguous().view(torch.uint8).numpy().tobytes()
        count += hashlib.sha256(raw).hexdigest() == weight["sha256"]
    return count


def measure(folder):
    facts = json.loads((folder / "expected.json").read_text())
    stored, dtype = load_file(folder / "expected.safetensors")["logits"], getattr(torch, facts["dtype"])
    contents = open_quantized(folder)
    size = sum(info.nbytes for info in contents.checkpoint.tensors.values())
    codebook = any(layer.scheme and layer.scheme.codebook for layer in contents.layers.values())
    plain = load(folder, "reference", dtype)
    exact = logits(plain)
    portable = memory(load(folder, "codebook" if codebook else "dequant", "auto"))
    chosen = load(folder, None, dtype)
    fast, laid_out = logits(chosen), memory(load(folder, None, "auto"))
    twin = logits(plain.dequantize() if hasattr(plain, "hf_quantizer") else plain)
    schemes = sorted({str(layer.scheme) if layer.scheme else layer.note for layer in contents.layers.values()})
    return {
        "checkpoint": folder.name,
        "model": "MoE" if any(".experts." in name for name in contents.layers) else "dense",
        "made_by": facts["made_by"],
        "format": contents.format,
        "schemes": schemes,
        "layers": len(contents.layers),
        "identical_weights": identical(contents, facts),
        "max_logit_diff": (exact - twin).abs().max().item(),
        "max_logit_diff_chosen_kernel": (fast - twin).abs().max().item(),
        "max_logit_diff_stored": (exact - stored).abs().max().item(),
        "largest_logit": twin.abs().max().item(),
        "dtype": facts["dtype"],
        "file_bytes": size,
        "memory_over_file": portable / size,
        "memory_over_file_chosen_kernel": laid_out / size,
    }


def row(r):
    return (
        r["checkpoint"], r["model"], f"{r['format']}: {', '.join(r['schemes'])}", str(r["layers"]),
        f"{r['identical_weights']} of {r['layers']}", f"{r['max_logit_diff']:.2g}", f"{r['max_logit_diff_chosen_kernel']:.2g}",
        f"{r['max_logit_diff_stored']:.2g}", f"{r['memory_over_file']:.2f}", f"{r['memory_over_file_chosen_kernel']:.2f}",
    )  # fmt: skip


def main():
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    machine = {"machine": platform.machine(), "date": str(date.today())}
    machine |= {name: version(name) for name in ("torch", "transformers", "hf-quant")}
    sections, lines = {}, [str(machine), ""]
    for parent in [FIXTURES, *map(Path, sys.argv[1:])]:
        title = (
            "golden fixtures"
            if parent == FIXTURES
            else f"examples/ref-llama-16m through the original packages ({parent.name})"
        )
        rows = [measure(folder) for folder in sorted(parent.iterdir()) if (folder / "expected.safetensors").is_file()]
        sections[title] = rows
        lines += [f"## {title}", "", f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
        lines += [f"| {' | '.join(row(r))} |" for r in rows] + [""]
        made = sum(r["layers"] == r["identical_weights"] for r in rows)
        lines += [f"{len(rows)} load; in {made} every weight is bit for bit the original's own dequantization.", ""]
        print("\n".join(lines[-len(rows) - 6 :]))
    write("formats", {"machine": machine, "results": sections}, "\n".join(lines))


if __name__ == "__main__":
    main()
