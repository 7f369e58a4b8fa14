"""Full distillation: the shipped model trained with 2-bit weights against its float self, on text that it was trained on itself.

    apt-get install linux-doc-6.1 python3.11-doc perl-doc && python examples/make_corpus.py corpus
    python benchmarks/distilled.py --text corpus/train.txt --work WORK

Documents are taken from TEXT in the order of their hashes; those that share a paragraph with the held-out text are left out. The
result is measured as in `calibrated.py`: as a plain float32 model, KL to the float32 base on the same 65,536 held-out tokens, with
95 % intervals over documents. A training that was stopped goes on; WORK keeps what is done.
"""

import hashlib
import json
import os
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from _results import RESULTS, stem_for, write
from calibrated import HELD_OUT, SHIPPED, measure, plain, reference
from transformers import AutoTokenizer

import hf_quant as hq
from hf_quant.bench.machine import cpu_name
from hf_quant.data.text import SEPARATOR, paragraphs, read_text, split

SCHEME = "W2A16-g64-asym"
HEAD = "| bits/weight | start | trained | weight of hidden states | steps | tokens | windows | learning rate | held-out loss | KL | 95 % interval | top-1 | seconds of CPU |"


def sample(text: Path, tokens: int, out: Path) -> int:
    """Write documents of ``text`` to ``out``, about that many tokens; returns how many."""
    tokenizer, measured = AutoTokenizer.from_pretrained(SHIPPED), paragraphs(read_text(SHIPPED / "heldout.txt"))
    chosen, count = [], 0
    for document in sorted(split(read_text(text)), key=lambda each: hashlib.md5(each.encode()).hexdigest()):
        if count >= tokens:
            break
        if not paragraphs(document) & measured:
            chosen.append(document)
            count += len(tokenizer(document).input_ids) + 1
    out.write_text(SEPARATOR.join(f"\n{document}" for document in chosen))
    return count


def run(text: Path, work: Path, tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    work.mkdir(parents=True, exist_ok=True)
    data, out = work / "train.txt", work / "trained"
    count = sample(text, tokens, data)
    if not out.is_dir():
        begun = time.process_time()
        hq.train(
            str(SHIPPED), str(out), data=str(data), scheme=SCHEME, max_kl=1000, max_tokens=1024, say=print, **settings
        )
        (work / "seconds").write_text(f"{time.process_time() - begun}")
    training = json.loads((out / "recipe.json").read_text())["training"]
    del training["text"]["paragraphs"]  # a digest of each, which the text gives again
    model, bits = plain("ours rtn", SHIPPED, out, {})
    return {
        "bits_per_weight": bits, "distinct_tokens": count, "seconds": float((work / "seconds").read_text()), "training": training,
        "settings": settings, **measure(model, reference(SHIPPED, work)),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    training, settings = row["training"], row["settings"]
    kept = training["kept"]
    return (
        f"| {row['bits_per_weight']:.2f} | {settings['method']} | {settings.get('learn', 'weights')} | {training.get('hidden_weight', 0):g} | {training['settings']['steps']} | {training['tokens']:,} | "
        f"{settings['batch']} of {settings['train_context']} | {settings['lr']:g} | {kept['before']:.4f} to {kept['after']:.4f} | "
        f"{row['kl']:.5f} | {row['low']:.5f}..{row['high']:.5f} | {row['top1']:.1%} | {row['seconds']:.0f} |"
    )


@click.command(help=__doc__)
@click.option("--text", type=Path, required=True, help="Text of the model's own training.")
@click.option("--work", type=Path, required=True, help="Folder for what is done.")
@click.option("--tokens", type=int, default=2_040_000, show_default=True, help="Of TEXT that are trained on.")
@click.option("--method", default="calibrated", show_default=True, help="Where training begins.")
@click.option("--lr", type=float, default=4e-4, show_default=True)
@click.option("--batch", type=int, default=4, show_default=True)
@click.option("--context", "train_context", type=int, default=256, show_default=True)
@click.option("--steps", type=int, help="Default: once over the text.")
@click.option("--learn", default="weights", show_default=True, help="As for hf-quant train.")
@click.option("--hidden-weight", type=float, default=0.0, show_default=True, help="As for hf-quant train.")
@click.option("--dtype", default="auto", show_default=True, help="What the model computes in.")
@click.option("--pilot", is_flag=True, help="Print the row alone.")
def main(text: Path, work: Path, tokens: int, pilot: bool, **settings: Any) -> None:
    row = run(text, work.resolve(), tokens, settings)
    print(line(row), flush=True)
    if pilot:
        return
    about = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS"), "date": str(date.today()),
        "model": SHIPPED.name, "scheme": SCHEME, "held_out_tokens": HELD_OUT,
        **{name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    file = RESULTS / f"{stem_for(RESULTS, 'distilled', cpu_name())}.json"
    rows = [*(json.loads(file.read_text())["rows"] if file.is_file() else []), row]
    page = [
        *__doc__.split("\n\n")[0].splitlines(),
        "",
        *__doc__.split("\n\n")[2].splitlines(),
        "",
        str(about),
        "",
        HEAD,
    ]
    page += ["|---" * HEAD.count(" | ") + "|---|", *map(line, rows)]
    write("distilled", {"about": about, "rows": rows}, "\n".join(page))


if __name__ == "__main__":
    main()
