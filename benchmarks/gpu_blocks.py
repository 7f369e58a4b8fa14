"""Calibrated quantization on a GPU: seconds a block of the shapes of 7B, memory, and the quality beside a CPU's.

    python benchmarks/gpu_blocks.py [--rows FILE]
    python benchmarks/gpu_blocks.py --dry-run

Four blocks with random weights go through ``hf_quant.quantize`` by each method; their number of seconds and their memory do not
depend on the weights. Then the model that ships is quantized on the GPU and on the CPU, and the KL divergences are compared.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _gpu import Rows, device_for, gigabytes, parser, reset_peak
from gpu_model import SEVEN_BILLION, TINY, make
from safetensors.torch import save_file
from transformers import AutoTokenizer

import hf_quant

SHIPPED = Path(__file__).resolve().parents[1] / "examples" / "ref-llama-16m"
BLOCKS = 4
METHODS = ("gptq", "calibrated", "learned")


def blocks(folder: Path, out: Path, method: str, tokens: int, device: torch.device) -> dict[str, Any]:
    reset_peak(device)
    start = time.perf_counter()
    hf_quant.quantize(
        folder, out, scheme="W4A16-g128", method=method, device=str(device), calibration=str(folder / "ids.safetensors"),
        calibration_tokens=tokens, eval=False, tune=False, overwrite=True,
    )  # fmt: skip
    took = time.perf_counter() - start
    return {"seconds": took, "seconds_a_block": took / BLOCKS, **gigabytes(device)}


def quality(out: Path, scheme: str, method: str, device: str, tokens: int) -> dict[str, Any]:
    start = time.perf_counter()
    result = hf_quant.quantize(
        SHIPPED, out, scheme=scheme, method=method, device=device, calibration_tokens=tokens, max_tokens=tokens,
        text=str(SHIPPED / "heldout.txt"), overwrite=True,
    )  # fmt: skip
    return {"quality": result.to_dict()["results"][0]["quality"], "seconds": time.perf_counter() - start}


def main() -> None:
    options = parser(__doc__)
    arguments = options.parse_args()
    rows, device = Rows("blocks", arguments.rows), device_for(arguments.dry_run)
    root = Path(tempfile.mkdtemp(prefix="hf-quant-gpu-blocks-"))
    shapes, tokens = (TINY, 2048) if arguments.dry_run else (SEVEN_BILLION, 65536)
    folder = make(root / "model", shapes, device, layers=BLOCKS)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    length = min(2048, shapes["max_position_embeddings"])
    save_file({"input_ids": torch.randint(0, 500, (tokens // length, length))}, folder / "ids.safetensors")
    for method in METHODS:
        rows.attempt(
            {"method": method, "blocks": BLOCKS}, partial(blocks, folder, root / method, method, tokens, device)
        )
    recipes = (("W4A16-g128", "gptq"), ("W3A16-g128", "gptq"), ("W4A16-g128", "calibrated"))
    few = 512 if arguments.dry_run else 65536
    for scheme, method in recipes[:1] if arguments.dry_run else recipes:
        for where in dict.fromkeys((str(device), "cpu")):
            cell = {"shipped": scheme, "method": method, "device": where}
            rows.attempt(cell, partial(quality, root / "shipped", scheme, method, where, few))


if __name__ == "__main__":
    main()
