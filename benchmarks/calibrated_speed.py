"""Seconds that calibrated methods take for a billion weights, and for what, beside GPTQModel.

    python benchmarks/calibrated_speed.py --work WORK --peer PYTHON-OF-GPTQMODEL

Two blocks of a Llama of 2048 columns, 5632 in the MLP, with random numbers: 103 million weights in W4A16-g128, on 4096 tokens. Every
method runs in a process of its own, with one thread. Seconds are those of the processor, which other programs change little. Time is
that within the named functions, so that the reading of the model and the writing of the result are in the rest.
"""

import cProfile
import json
import pstats
import shutil
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from _results import write
from calibrated import PEER as SCRIPT
from calibrated import SHIPPED, call
from calibrated_peers import Watch, layers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_quant import HfQuantConfig
from hf_quant.bench.machine import cpu_name
from hf_quant.data.calibration import Calibration
from hf_quant.jobs.compress import Job, compress

METHODS, PEER = ("gptq", "calibrated"), "gptqmodel-gptq"
TOKENS, LENGTH = 4096, 512
PARTS = {  # what is told apart: where it begins
    "inputs and their statistics": ("solve/inputs.py", "collect"),
    "scaling by activations": ("transforms/awq.py", "apply"),
    "drift of the inputs": ("transforms/drift.py", "apply"),
    "codes of GPTQ": ("methods/gptq.py", "_solution"),
    "coordinate descent": ("methods/_descent.py", "descend"),
    "errors of candidates": ("methods/_nearest.py", "judged"),
    "error of the result": ("core/stats.py", "error"),
}


def make(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ours(model: Path, method: str, out: Path, ids: torch.Tensor) -> dict[str, Any]:
    """Quantize in this process, watched."""
    shutil.rmtree(out, ignore_errors=True)
    job = Job(str(model), {"dtype": "auto"}, "5GB", False, lambda _: None, calibration=Calibration(ids, "random", []))
    config = HfQuantConfig("W4A16-g128", method=method)
    with Watch() as watch, cProfile.Profile(time.process_time) as profile:
        compress(job, config, out)
    stats: Any = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    parts = {
        name: sum(entry[3] for (file, _, what), entry in stats.items() if file.endswith(path) and what == function)
        for name, (path, function) in PARTS.items()
    }
    return watch.to_dict() | {"parts": parts}


def line(name: str, weights: int, cost: dict[str, Any]) -> str:
    whole, parts = cost["cpu_seconds"], cost.get("parts", {})
    shares = [f"{parts[part] / whole:.0%}" if parts.get(part) else "-" for part in PARTS]
    rest = f"{1 - sum(parts.values()) / whole:.0%}" if parts else "-"
    return (
        f"| {name} | {cost['cpu_seconds'] / weights * 1e9:.0f} | {cost['peak_mb'] - cost['imports_mb']:.0f} | "
        f"{' | '.join(shares)} | {rest} |"
    )


@click.command(help=__doc__)
@click.option("--work", type=Path, required=True, help="Folder for the model and the results.")
@click.option("--peer", metavar="PYTHON", help="Where GPTQModel is installed.")
@click.option("--method", type=click.Choice(METHODS), hidden=True, help="Run this one in this process.")
def main(work: Path, peer: str | None, method: str | None) -> None:
    work = work.resolve()
    model, calibration = work / "speed-model", work / "speed-calibration.safetensors"
    ids = torch.randint(0, 2048, (TOKENS // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    if method is not None:
        print(json.dumps(ours(model, method, work / f"speed-{method}", ids)))
        return
    if not model.is_dir():
        make(model)
    save_file({"ids": ids}, calibration)
    weights = sum(weight.numel() for weight in layers(model).values())
    rows = {}
    for name in METHODS:
        command = [sys.executable, __file__, "--work", str(work), "--method", name]
        rows[f"ours {name}"] = call(command, 1, work)
        print(line(name, weights, rows[f"ours {name}"]), flush=True)
    if peer:
        shutil.rmtree(work / "speed-peer", ignore_errors=True)
        command = [str(Path(peer).absolute()), str(SCRIPT), "quantize", PEER, str(model), str(calibration), "4", "128", str(work / "speed-peer")]  # fmt: skip
        rows[PEER] = call(command, 1, work)
        print(line(PEER, weights, rows[PEER]), flush=True)
    about = {
        "cpu": cpu_name(),
        "date": str(date.today()),
        "weights": weights,
        "tokens": TOKENS,
        "torch": torch.__version__,
    }
    about |= rows.get(PEER, {}).get("versions", {})
    columns = ["method", "seconds a billion weights", "peak MB over imports", *PARTS, "rest"]
    page = [*__doc__.split("\n\n")[0].splitlines(), "", *__doc__.split("\n\n")[2].splitlines(), "", str(about), ""]
    page += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    write(
        "calibrated_speed",
        {"about": about, "rows": rows},
        "\n".join([*page, *(line(n, weights, c) for n, c in rows.items())]),
    )


if __name__ == "__main__":
    main()
