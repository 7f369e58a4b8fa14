"""INT8 activations on the shipped model and on its variant with outlier channels: what they cost, and what brings it back.

    python benchmarks/int8_activations.py --work WORK [--row NAME ...]

Calibrated on 32,768 tokens of calibration.txt, measured on 16,384 of heldout.txt in float32, so that nothing but the
quantization shows; KL to the float32 model in nats per token, with 95 % intervals over documents. In the variant some channels
of every norm are 30 times stronger and the weights that read them as much weaker: it computes the same.
"""

import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from _results import write
from outlier_variant import make
from transformers import AutoTokenizer

from hf_quant import HfQuantConfig, load
from hf_quant.data.text import read_text, windows
from hf_quant.evaluation.measure import evaluate
from hf_quant.evaluation.yardstick import Base

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "examples" / "ref-llama-16m"
CALIBRATION, HELD_OUT = 32768, 16384  # tokens
MIXED = "W8A8, SmoothQuant + GPTQ, down_proj's activations in float"
ROWS = {  # name: scheme, method
    "W8A16, one scale a row": ("W8A16-g-1", "rtn"),
    "W8A8": ("W8A8", "rtn"),
    "W8A8, SmoothQuant": ("W8A8", "smoothquant+rtn"),
    "W8A8, SmoothQuant + GPTQ": ("W8A8", "smoothquant+gptq"),
    MIXED: ("W8A8", "smoothquant+gptq"),
    "W8A8, calibrated": ("W8A8", "calibrated"),
    "W8A8, outlier columns 1.2 %": ("W8A8-o1.2%-columns", "gptq"),
    "W8A8, outlier columns 5 %, SmoothQuant + GPTQ": ("W8A8-o5%-columns", "smoothquant+gptq"),
    "W8A8, LLM.int8 threshold": ("W8A8-threshold", "rtn"),
    "W8A8, LLM.int8 threshold, SmoothQuant + GPTQ": ("W8A8-threshold", "smoothquant+gptq"),
    "W8A8 static": ("W8A8-static", "gptq"),
    "W8A8 static, SmoothQuant + GPTQ": ("W8A8-static", "smoothquant+gptq"),
    "W4A16-g128": ("W4A16-g128", "rtn"),
    "W4A8-g128": ("W4A8-g128", "rtn"),
    "W4A16-g128, GPTQ": ("W4A16-g128", "gptq"),
    "W4A8-g128, SmoothQuant + GPTQ": ("W4A8-g128", "smoothquant+gptq"),
}


def measured(model: str, row: str, ids: torch.Tensor, reference: Any) -> dict[str, Any]:
    """One cell of the table."""
    scheme, method = ROWS[row]
    overrides = {"*.down_proj": "W8A16-g-1"} if row == MIXED else {}
    data = {} if method == "rtn" else {"calibration": ids, "calibration_tokens": CALIBRATION}
    config = HfQuantConfig(scheme, method=method, overrides=overrides, **data)
    quality = evaluate(load(model, dtype=torch.float32, quantization_config=config).eval(), reference)
    kl = quality.metrics["kl"]
    return {
        "scheme": scheme, "method": method, "kl": kl.value, "low": kl.low, "high": kl.high, "noise": kl.noise,
        "top1": quality.metrics["top1"].value,
    }  # fmt: skip


@click.command()
@click.option(
    "--work", required=True, type=click.Path(path_type=Path), help="Folder for the variant and what is done."
)
@click.option("--row", multiple=True, type=click.Choice(list(ROWS)), help="Only these.")
@click.option("--tokens", default=HELD_OUT, help="Measured on.")
def main(work: Path, row: tuple[str, ...], tokens: int) -> None:
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    variant, done = work / "variant", work / "int8_activations.json"
    if not variant.exists():
        make(SHIPPED, variant)
    found: dict[str, Any] = json.loads(done.read_text()) if done.exists() else {}
    for name, model in {"shipped": SHIPPED, "outliers": variant}.items():
        tokenizer, base = AutoTokenizer.from_pretrained(model), Base(str(model))
        ids = windows(tokenizer, read_text(model / "calibration.txt"), base.context(), CALIBRATION).ids
        reference = base.reference(tokenizer, read_text(model / "heldout.txt"), max_tokens=tokens, cache=work / "base")
        for each in row or ROWS:
            if each not in found.setdefault(name, {}) or row:
                found[name][each] = measured(str(model), each, ids, reference)
                print(name, each, json.dumps(found[name][each]), file=sys.stderr)
                done.write_text(json.dumps(found))
    record = {"tokens": tokens, "torch": torch.__version__, "machine": platform.processor(), "date": str(date.today())}
    found = {model: {each: cells[each] for each in ROWS if each in cells} for model, cells in found.items()}
    write("int8_activations", record | {"models": found}, page(found, record))


def page(found: dict[str, Any], record: dict[str, Any]) -> str:
    clean = found["shipped"]["W8A16, one scale a row"]
    lines = [
        f"Measured on {record['tokens']:,} held-out tokens ({record['date']}, torch {record['torch']}), all in float32; the base "
        f"in bf16 against itself: KL {clean['noise']:.5f}.", "",
        "| | shipped model: KL | top-1 | x W8A16 | with outlier channels: KL | top-1 | x the same, shipped |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, cell in found["shipped"].items():
        other = found["outliers"].get(name)
        end = f"{other['kl']:.5f} | {other['top1']:.1%} | {other['kl'] / cell['kl']:.2f} |" if other else "- | - | - |"
        lines.append(
            f"| {name} | {cell['kl']:.5f} ({cell['low']:.5f}..{cell['high']:.5f}) | {cell['top1']:.1%} | {cell['kl'] / clean['kl']:.2f} | {end}"
        )
    return "# INT8 activations\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
