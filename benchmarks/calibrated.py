"""Calibrated quantization beside its peers: same calibration tokens, same held-out text, same bits and group size.

    python benchmarks/calibrated.py --work WORK --peer gptqmodel=PYTHON --peer auto-round=PYTHON --peer hqq=PYTHON ...

Each peer runs in its own environment (`calibrated_peers.py`), at its defaults for the bits and group size; rows marked with a
star use options that the peer offers beyond them. All layers of the decoder's blocks are quantized; embeddings and head are
not. Every result, ours too, becomes a plain float32 model and is measured alike: KL to the float32 model it was made from,
per token, with 95 % intervals over documents. "Text of its own" is what `hf-quant generate` writes from the same calibration
tokens, beside these: 262,144 tokens for `learned`, 1,000,000 for `hf-quant train`, which trains embeddings and norms too.
"Trained on" begins from the row above (--row needs that one first), does not compare hidden states, and sees another
1,000,000, then the first ones again, then a third 1,000,000; "trained after learned" likewise begins from `learned` on text of
its own. The text is written once for all schemes, and the time for that is not in the row. What is done stays in WORK, so
single rows can be redone (--row, --again) and timed again when the machine is quiet (--timing); they take the place of theirs
in the results that are committed. A cell that a peer cannot do says why, in the peer's words.
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from _results import RESULTS, stem_for, write
from calibrated_peers import PEERS, Watch, bits_per_weight, layers, stored, turned
from outlier_variant import make
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quant import load
from hf_quant.bench.machine import cpu_name
from hf_quant.data.text import read_text, windows
from hf_quant.evaluation.bootstrap import interval, sums
from hf_quant.evaluation.measure import token_values
from hf_quant.evaluation.reference import Reference
from hf_quant.evaluation.yardstick import Base
from hf_quant.nn import QuantLinear

HERE = Path(__file__).resolve().parent
SHIPPED, PEER = HERE.parent / "examples" / "ref-llama-16m", HERE / "calibrated_peers.py"
SCHEMES = {"W4 g128": (4, 128), "W3 g128": (3, 128), "W2 g64": (2, 64)}
OWN_TEXT = "ours learned asym, text of its own"
TRAINED = "ours trained asym, text of its own"
ON, AGAIN, FOURTH = "ours trained on, more text of its own", "ours trained on again", "ours trained on a fourth time"
AFTER_LEARNED = "ours trained after learned, text of its own"
ON_AFTER = "ours trained on after learned, more text of its own"
THIRD_AFTER = "ours trained a third time after learned, in float32"
BEFORE = {  # where a training without hidden states begins
    ON: TRAINED, AGAIN: ON, FOURTH: AGAIN, AFTER_LEARNED: OWN_TEXT, ON_AFTER: AFTER_LEARNED, THIRD_AFTER: ON_AFTER,
}  # fmt: skip
OURS = {
    "ours rtn": ["--method", "rtn"],
    "ours gptq": ["--method", "gptq"],
    "ours gptq, activations on disk": ["--method", "gptq", "--max-memory", "0"],
    "ours gptq asym": ["--method", "gptq", "--asym"],
    "ours awq": ["--method", "awq"],
    "ours calibrated": ["--method", "calibrated"],
    "ours calibrated asym": ["--method", "calibrated", "--asym"],
    "ours learned": ["--method", "learned"],
    "ours learned asym, untuned": ["--method", "learned", "--asym", "--no-tune"],
    "ours learned asym": ["--method", "learned", "--asym"],
    OWN_TEXT: ["--method", "learned", "--asym", "--epochs", "2"],
    TRAINED: ["--method", "calibrated", "--asym", "--learn", "all", "--hidden-weight", "3", "--batch", "2"],
    **{row: ["--asym", "--learn", "all", "--batch", "2"] for row in BEFORE},
}
OURS[THIRD_AFTER].append("--float32")
MILLION = ["--tokens", "1000000", "--batch", "128", "--seed"]
FIRST, SECOND, THIRD = ([*MILLION, seed] for seed in "123")
GENERATED = {  # its own text
    OWN_TEXT: [], TRAINED: FIRST, ON: SECOND, AGAIN: FIRST, FOURTH: THIRD, AFTER_LEARNED: FIRST, ON_AFTER: SECOND,
    THIRD_AFTER: THIRD,
}  # fmt: skip
RATES = {  # of training
    TRAINED: {4: "1e-4", 3: "4e-4", 2: "7e-4"},
    ON: {4: "1.5e-4", 3: "3e-4", 2: "5e-4"},
    AGAIN: {4: "1e-4", 3: "2e-4", 2: "3.5e-4"},
    FOURTH: {4: "3e-5", 3: "6e-5", 2: "7e-5"},
    AFTER_LEARNED: {4: "1.5e-4", 3: "3e-4", 2: "5e-4"},
    ON_AFTER: {4: "2.5e-5", 3: "5e-5", 2: "1e-4"},
    THIRD_AFTER: {4: "2e-5", 3: "4e-5", 2: "7e-5"},
}
CALIBRATION, HELD_OUT = 65536, 65536  # tokens
SMALL = (
    "Made by `train_small.py --like {} --layers 6 --minutes 8 --characters 40000000`, before it left documents out: 57 of the 1,668 "
    "paragraphs of the held-out text were in its training text."
)
ABOUT = {f"{like}-7m": SMALL.format(like) for like in ("qwen3", "gpt2")}  # models that are not shipped

Cell = dict[str, Any]


class RowError(Exception):
    """What a row's own process said last."""


def call(command: list[str], threads: int, folder: Path, **extra: str) -> Cell:
    """Run a row's process in ``folder``, where some leave logs; its last line is what it found out."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **extra}
    env["GPTQMODEL_CPU_WORKERS"] = "2"  # with two cores GPTQModel 7.7 makes one worker, asks for two, and stops
    start = time.perf_counter()
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RowError(next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")[:300])
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": time.perf_counter() - start}


def call_ours(command: str, model: Path, out: Path, options: list[str], threads: int, work: Path) -> Cell:
    """Run one of our commands in a process of its own."""
    ours = [sys.executable, str(HERE / "calibrated.py"), "--ours", command, str(model), "-o", str(out), "-q"]
    return call([*ours, *options], threads, work)


def text_of(model: Path) -> list[str]:
    """Options that name its calibration text."""
    return ["--calibration", str(model / "calibration.txt"), "--calibration-tokens", str(CALIBRATION)]


def quantize(row: str, model: Path, work: Path, scheme: str, pythons: dict[str, str], out: Path, threads: int) -> Cell:
    """Quantize ``model`` into ``out``: what it cost."""
    bits, group_size = SCHEMES[scheme]
    shutil.rmtree(out, ignore_errors=True)
    if row in OURS:
        how = ["--bits", str(bits), "--group-size", str(group_size), *OURS[row]]
        gated = bits == 2 or row in RATES  # 2 bits need a gate, and training measures anyway
        gate = ["--max-kl", "1000", "--max-tokens", "1024"] if gated else ["--no-eval"]
        command, text = "train" if row in RATES else "quantize", text_for(row, bits, model, work, threads)
        if row in BEFORE:
            text += ["--start", str(output_of(BEFORE[row], scheme, work))]
        return call_ours(command, model, out, [*how, *text, *gate], threads, work)
    python = pythons[PEERS[row].package]
    return call(
        [python, str(PEER), "quantize", row, str(model), str(work / "calibration.safetensors"), str(bits),
         str(group_size), str(out)],
        threads,
        work,
    )  # fmt: skip


def text_for(row: str, bits: int, model: Path, work: Path, threads: int) -> list[str]:
    """Options that name what a row of ours looks at."""
    if row in RATES:
        return ["--data", str(own_text(row, model, work, threads)), "--lr", RATES[row][bits]]
    if row == OWN_TEXT:
        return ["--calibration", str(own_text(row, model, work, threads))]
    return [] if row == "ours rtn" else text_of(model)  # rounding looks at no text


def output_of(row: str, scheme: str, work: Path) -> Path:
    """The folder of what a row made."""
    return work / f"{row} {scheme}".replace(",", "").replace(" ", "-")


def own_text(row: str, model: Path, work: Path, threads: int) -> Path:
    """What ``model`` writes after the calibration text, with it."""
    options = GENERATED[row]
    file = work / f"generated{''.join(options)}.safetensors"
    if not file.is_file():
        cost = call_ours("generate", model, file, [*text_of(model), *options], threads, work)
        file.with_suffix(".json").write_text(json.dumps(cost))
    return file


def plain(row: str, model: Path, out: Path, pythons: dict[str, str]) -> tuple[Any, float]:
    """The model in ``out`` as plain float32, and its bits per weight."""
    if row in OURS:
        made, original = load(str(out)), layers(model)
        found = {name: module for name, module in made.named_modules() if isinstance(module, QuantLinear)}
        if set(found) != set(original):
            raise RowError(f"other layers were quantized: {sorted(set(found) ^ set(original))}")
        rest = {
            name: p.float()
            for name, p in made.named_parameters()
            if name.endswith(".bias") or name.rpartition(".")[0] not in found
        }
        weights = {f"{name}.weight": turned(name, module.dequantize(torch.float32)) for name, module in found.items()}
        floats = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        missing, unexpected = floats.load_state_dict(rest | weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise RowError(f"missing {missing}, unexpected {unexpected}")
        return floats.eval(), bits_per_weight(stored(out), original)
    shutil.rmtree(f"{out}-plain", ignore_errors=True)
    command = [pythons[PEERS[row].package], str(PEER), "dequantize", row, str(model), str(out), f"{out}-plain"]
    size = call(command, 1, out.parent, TORCHDYNAMO_DISABLE="1")["bits_per_weight"]
    return AutoModelForCausalLM.from_pretrained(f"{out}-plain", dtype=torch.float32).eval(), size


def measure(model: Any, base: Reference) -> Cell:
    """KL to the base and top-1 agreement; sums over documents are kept, for intervals of differences."""
    values, _ = token_values(model, base)
    document = base.windows.document[:, 1:][base.windows.scored]
    total, count = sums(values["kl"], document)
    low, high = interval(total, count) or (math.nan, math.nan)
    return {
        "kl": (total.sum() / count.sum()).item(), "low": low, "high": high, "top1": values["top1"].mean().item(),
        "kl_sums": total.tolist(), "counts": count.tolist(),
    }  # fmt: skip


def reference(model: Path, work: Path) -> Reference:
    """The base's word on the held-out text; the calibration tokens are written on the way."""
    tokenizer, base = AutoTokenizer.from_pretrained(model), Base(str(model))
    ids = windows(tokenizer, read_text(model / "calibration.txt"), base.context(), CALIBRATION).ids
    save_file({"ids": ids.contiguous()}, work / "calibration.safetensors")
    return base.reference(tokenizer, read_text(model / "heldout.txt"), max_tokens=HELD_OUT, cache=work / "base")


def folder_of(name: str, here: Path) -> Path:
    """Where the model called ``name`` is: the shipped one, its variant with outliers, which is made in ``here``, or a folder."""
    if name == "ref-llama-16m":
        return SHIPPED
    if name != "outliers":
        return Path(name).resolve()
    if not (here / name).is_dir():
        make(SHIPPED, here / name)
    return here / name


def fill(row: str, model: Path, scheme: str, work: Path, base: Reference, pythons: dict[str, str]) -> Cell:
    cell: Cell = {"row": row, "model": model.name, "scheme": scheme, "date": str(date.today())}
    out = output_of(row, scheme, work)
    try:
        cell["cost"] = quantize(row, model, work, scheme, pythons, out, threads=1)
        made, cell["bits_per_weight"] = plain(row, model, out, pythons)
        cell |= measure(made, base)
    except RowError as error:
        cell["error"] = str(error)
    shutil.rmtree(f"{out}-plain", ignore_errors=True)
    return cell


def cells_of(work: Path) -> list[Cell]:
    """What is done in ``work``, in place of the same cells of the results that are committed for this processor."""
    order = [*OURS, *PEERS]
    committed = RESULTS / f"{stem_for(RESULTS, 'calibrated', cpu_name())}.json"
    cells = json.loads(committed.read_text())["cells"] if committed.is_file() else []
    cells += [json.loads(file.read_text()) for file in work.glob("*/cells/*.json")]
    by_name = {(cell["model"], cell["scheme"], cell["row"]): cell for cell in cells}
    found = [cell for cell in by_name.values() if cell["row"] in order]
    return sorted(found, key=lambda c: (c["model"], list(SCHEMES).index(c["scheme"]), order.index(c["row"])))


def difference(ours: Cell, peer: Cell) -> tuple[float, float, float]:
    """KL of ours less that of a peer, on the same tokens, with its interval."""
    total = torch.tensor(ours["kl_sums"]) - torch.tensor(peer["kl_sums"])
    count: Tensor = torch.tensor(ours["counts"])
    return (total.sum() / count.sum()).item(), *(interval(total.double(), count.double()) or (math.nan, math.nan))


def title(row: str) -> str:
    return row + ("" if row in OURS or PEERS[row].default else " *")


def line(cell: Cell) -> str:
    head = f"| {title(cell['row'])} |"
    if "error" in cell:
        return f"{head} - | - | - | - | - | - | {cell['error']} |"
    cost = cell["cost"]
    quiet = f"{cost['threads']} threads, load {cost['load_before']:.1f}"
    cpu = f" ({cost['cpu_seconds']:.0f})" if "cpu_seconds" in cost else ""
    return (
        f"{head} {cell['bits_per_weight']:.2f} | {cell['kl']:.5f} | {cell['low']:.5f}..{cell['high']:.5f} | "
        f"{cell['top1']:.1%} | {cost['seconds']:.1f}{cpu} | {cost['peak_mb'] - cost['imports_mb']:.0f} "
        f"({cost['peak_mb']:.0f}) | {quiet} |"
    )


def verdict(cells: list[Cell]) -> list[str]:
    """Our rows against the best of the peers' defaults, and against the best of all their rows."""
    made = []
    for ours in [cell for cell in cells if cell["row"] in OURS]:
        for which, rows in (
            ("of the defaults", [name for name, peer in PEERS.items() if peer.default]),
            ("of all rows", list(PEERS)),
        ):
            peers = [cell for cell in cells if cell["row"] in rows and "kl" in cell]
            if not peers or "kl" not in ours:
                continue
            best = min(peers, key=lambda cell: cell["kl"])
            mean, low, high = difference(ours, best)
            made.append(
                f"- {ours['row']}: {ours['kl'] / best['kl']:.2f} times the KL of the best {which} ({best['row']}), "
                f"difference {mean:+.5f} ({low:+.5f}..{high:+.5f}): {'held' if mean <= 0 else 'lost'}"
            )
    return made


def report(work: Path) -> None:
    cells = cells_of(work)
    versions: dict[str, str] = {}
    for cell in cells:
        versions |= cell.get("cost", {}).get("versions", {})
    about = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    about |= {"date": str(date.today()), **versions, "calibration_tokens": CALIBRATION, "held_out_tokens": HELD_OUT}
    lines = [str(about), "", *__doc__.split("\n\n")[2].splitlines()]
    head = "| row | bits/weight | KL | 95 % interval | top-1 | seconds (of CPU) | peak MB over imports (peak) | timed with |"
    for model in sorted({cell["model"] for cell in cells}):
        for scheme in SCHEMES:
            here = [cell for cell in cells if (cell["model"], cell["scheme"]) == (model, scheme)]
            lines += [
                "",
                f"## {model}, {scheme}",
                "",
                *([ABOUT[model], ""] if model in ABOUT else []),
                head,
                "|---" * 8 + "|",
                *map(line, here),
                "",
                *verdict(here),
            ]
            missing = [title(row) for row in [*OURS, *PEERS] if row not in [cell["row"] for cell in here]]
            lines += ["", f"Not run: {', '.join(missing)}."] if missing else []
    write("calibrated", {"about": about, "cells": cells}, "\n".join(lines))


@click.command(help=__doc__)
@click.option("--work", type=Path, required=True, help="Folder for what is done.")
@click.option("--peer", multiple=True, metavar="PACKAGE=PYTHON", help="Where a peer is installed.")
@click.option("--row", multiple=True, type=click.Choice([*OURS, *PEERS]), help="Only these rows.")
@click.option("--scheme", multiple=True, type=click.Choice(list(SCHEMES)), help="Only these schemes.")
@click.option("--model", multiple=True, metavar="NAME",
              help="Only these models: ref-llama-16m, outliers, or a folder with calibration.txt and heldout.txt, as train_small.py makes.")  # fmt: skip
@click.option("--again", is_flag=True, help="Redo cells that are done.")
@click.option("--timing", is_flag=True, help="Only quantize once more and note what it cost, with two threads.")
def main(
    work: Path, peer: tuple[str, ...], row: tuple[str, ...], scheme: tuple[str, ...], model: tuple[str, ...],
    again: bool, timing: bool,
) -> None:  # fmt: skip
    pythons = {name: str(Path(python).absolute()) for name, _, python in (each.partition("=") for each in peer)}
    rows = [each for each in row or [*OURS, *PEERS] if each in OURS or PEERS[each].package in pythons]
    for name in model or ("ref-llama-16m", "outliers"):
        here = work.resolve() / Path(name).name
        (here / "cells").mkdir(parents=True, exist_ok=True)
        folder = folder_of(name, here)
        base = reference(folder, here)
        for each in scheme or SCHEMES:
            for one in rows:
                file = here / "cells" / f"{one} {each}.json".replace(",", "").replace(" ", "-")
                done = json.loads(file.read_text()) if file.is_file() else None
                if timing and done and "error" not in done:
                    done["cost"] = quantize(one, folder, here, each, pythons, here / "timed", threads=2)
                elif timing or (done and not again):
                    continue
                else:
                    done = fill(one, folder, each, here, base, pythons)
                file.write_text(json.dumps(done))
                print(f"{name} {each} {line(done)}", flush=True)
    report(work)


def ours(arguments: list[str]) -> None:
    """The command, watched."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (what everybody imports is not counted)

    from hf_quant.cli import main as command

    with Watch() as watch:
        command(arguments, standalone_mode=False)
    print(json.dumps(watch.to_dict()))


if __name__ == "__main__":
    ours(sys.argv[2:]) if sys.argv[1:2] == ["--ours"] else main()
