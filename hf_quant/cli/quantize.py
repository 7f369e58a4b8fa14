"""``hf-quant quantize``: a model becomes a smaller one in a folder, and the table says what it cost."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._common import (
    CALIBRATION,
    Measuring,
    bars,
    budget,
    configs,
    emit,
    gate_lines,
    gate_options,
    measure_options,
    output_options,
    say,
    scheme_options,
    size,
    table,
)
from hf_quant.errors import HfQuantError

if TYPE_CHECKING:
    from hf_quant.calibration import Calibration
    from hf_quant.evaluation.gate import Budget
    from hf_quant.hf import HfQuantConfig

HEAD = ("scheme", "MB", "bits/weight", "quantized", "perplexity", "KL (nats)", "95 % interval", "top-1", "seconds")
TOKENS = 32768  # measured by default: enough for intervals, and soon done


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, help="Folder of the result; of several schemes, their parent.")
@scheme_options
@click.option("--dtype", default="auto", show_default=True, help="What the model computes in.")
@click.option("--device", help="Where to quantize: cpu, cuda, auto, ...")
@click.option("--revision", help="Of a Hub model.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@click.option(
    "--eval/--no-eval",
    "wanted",
    default=None,
    help="Measure the result; default: if there is a gate, --text, or heldout.txt beside the model.",
)
@click.option(
    "--calibration",
    metavar="TEXT",
    help="For calibrated methods: a UTF-8 or JSONL file, or ID[:CONFIG][@SPLIT][#COLUMN][~REVISION] of a datasets set; "
    "default: calibration.txt beside the model, else a bundled text.",
)
@click.option("--calibration-tokens", default=65536, show_default=True, help="How much of it.")
@click.option("--max-memory", type=size, help="What activations may take before they go to disk, such as 2GB.")
@measure_options
@gate_options
@click.option("--prompt", help="Let the saved model continue this.")
@output_options
def command(
    model: str, output: str, dtype: str, device: str | None, revision: str | None, max_shard_size: str, overwrite: bool,
    wanted: bool | None, calibration: str | None, calibration_tokens: int, max_memory: int | None, text: str | None, dataset: str | None, context: int | None, stride: int | None,
    max_tokens: int | None, base_dtype: str, allow_overlap: bool, max_kl: float | None, max_ppl_increase: float | None,
    min_top1: float | None, prompt: str | None, as_json: bool, quiet: bool, **scheme: Any,
) -> None:  # fmt: skip
    """Quantize MODEL, a folder or a Hub id."""
    from hf_quant.compress import Job, compress, tokenizer_of
    from hf_quant.ranks import Ranks
    from hf_quant.text import refuse_overlap

    plans, gate = configs(**scheme), budget(max_kl, max_ppl_increase, min_top1)
    _refuse_two_bits(plans, gate)
    ranks = Ranks.found()
    quiet = quiet or not ranks.first
    shown = bars(quiet or as_json)
    if Path(model).is_dir():
        from hf_quant.checkpoint import Checkpoint

        Checkpoint.open(Path(model))
        _warn_if_training(Path(model))
    how = Measuring(text, dataset, context, stride, max_tokens or TOKENS, base_dtype, allow_overlap)
    if wanted is False and gate:
        raise click.UsageError("a gate has to measure: it cannot go with --no-eval")
    tokenizer = tokenizer_of(model, revision, say)
    calibrated_on = _calibration(plans, model, calibration, calibration_tokens, tokenizer)
    always = wanted or gate or calibrated_on is not None
    found = None if wanted is False or not ranks.first else how.find(model) if always else how.beside(model)
    from_hub = {"dtype": dtype, "device_map": device, "revision": revision}
    given = {k: v for k, v in from_hub.items() if v is not None}
    outs = [Path(output) / p.scheme for p in plans] if len(plans) > 1 else [Path(output)]
    measure = None
    if found is not None and calibrated_on is not None and not allow_overlap:
        refuse_overlap(found[1], calibrated_on.paragraphs)
    if found is not None:
        measure = how.yardstick(model, found[1], tokenizer, revision=revision, device=device, shown=shown, quiet=quiet)
    job = Job(
        model, given, max_shard_size, overwrite, lambda line: say(line, quiet), tokenizer, gate, measure, calibrated_on,
        lambda blocks: blocks_shown(blocks, shown), max_memory, ranks,
    )  # fmt: skip
    with _resumable({out: plan.scheme for plan, out in zip(plans, outs, strict=True)}):
        rows = [compress(job, plan, out) for plan, out in zip(plans, outs, strict=True)]
    if not ranks.first:
        return
    missed = [line for row in rows for line in gate_lines(row.get("gate", {"misses": []}), row["layers"])]
    folders = [out.with_name(row["folder"]) for row, out in zip(rows, outs, strict=True)]
    said = _continue(folders[-1], prompt, tokenizer) if prompt else None
    record = {"model": model, "results": rows} | ({"generated": said} if said else {})
    human = table(HEAD, _lines(rows))
    if found is not None:
        human += f"\n\nmeasured on {rows[0]['quality']['tokens']:,} held-out tokens of {found[0]}"
    if said:
        human += f"\n\n{folders[-1]} continues:\n{said}"
    emit(as_json, quiet, record=record, essential="\n".join(map(str, folders)), human=human)
    for line in missed:
        say(line)
    if missed:
        sys.exit(3)


@contextmanager
def _resumable(schemes: dict[Path, str]) -> Iterator[None]:
    """Whoever stops this, or has no disk left, is told how to go on; what is whole already would be refused then."""
    from hf_quant.compress import work_folder
    from hf_quant.journal import is_journal

    try:
        yield
    except (KeyboardInterrupt, OSError):
        for out, scheme in schemes.items():
            if is_journal(work_folder(out)):
                only = f" with --scheme {scheme} -o {out}" if len(schemes) > 1 else ""
                say(f"{work_folder(out)} holds the finished blocks: the same command{only} goes on from there")
        raise


def _calibration(
    plans: list[HfQuantConfig], model: str, source: str | None, tokens: int, tokenizer: Any
) -> Calibration | None:
    """What calibrated methods look at; None if no method is one."""
    from hf_quant.calibration import calibration
    from hf_quant.evaluation.yardstick import Base
    from hf_quant.presets import preset

    if not any(preset(plan.method, plan.default_scheme).calibrated for plan in plans):
        return None
    beside = Path(model) / CALIBRATION
    found = str(beside) if source is None and beside.is_file() else source
    base = Base(model)
    return calibration(found, tokenizer, base.context(), tokens, base.vocabulary())


def blocks_shown(blocks: Iterable[Any], shown: bool) -> Iterator[Any]:
    """A bar with seconds a block, the time left, and the peak memory of this process so far."""
    from tqdm import tqdm

    with tqdm(blocks, desc="blocks", unit="block", disable=not shown) as bar:
        for block in bar:
            yield block
            bar.set_postfix_str(f"peak {peak_memory() / 1e9:.1f} GB")


def peak_memory() -> int:
    """Bytes of this process in memory at most so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _refuse_two_bits(plans: list[HfQuantConfig], gate: Budget) -> None:
    from hf_quant.scheme import QuantScheme

    for plan in plans:
        slugs = [plan.scheme, *(slug for slug in plan.overrides.values() if slug)]
        if not gate and any(QuantScheme.parse(slug).bits == 2 for slug in slugs):
            raise click.UsageError(
                f"{plan.scheme}: 2 bits break most models, so they need a gate: say what it may cost, for example "
                "--max-kl 0.1"
            )


def _warn_if_training(folder: Path) -> None:
    found = [name for name in ("optimizer.pt", "optimizer.bin", "scheduler.pt") if (folder / name).is_file()]
    if found:
        say(
            f"{folder}: {found[0]} lies beside the model, so it may still be training; quantize last, or train with QAT"
        )


def _continue(folder: Path, prompt: str, tokenizer: Any) -> str:
    """Greedy, from the folder that was written."""
    import torch

    from hf_quant import load

    if tokenizer is None:
        raise HfQuantError("--prompt needs a tokenizer")
    model, ids = load(str(folder)), torch.tensor([tokenizer(prompt).input_ids])
    out = model.generate(ids.to(model.device), max_new_tokens=40, do_sample=False)
    made: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return made


def _lines(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    first = rows[0].get("quality", {}).get("metrics", {}).get("base_perplexity")
    base = f"{first['value']:.3f}" if first else "-"
    yield "base", f"{rows[0]['base_bytes'] / 1e6:.1f}", "-", "-", base, "-", "-", "-", "-"
    for row in rows:
        size = (f"{row['bytes'] / 1e6:.1f}", f"{row['bits_per_weight']:.2f}", f"{row['share_quantized']:.1%}")
        yield row["scheme"], *size, *_quality(row.get("quality")), f"{row['seconds']:.1f}"


def _quality(quality: dict[str, Any] | None) -> tuple[str, str, str, str]:
    if quality is None or quality["kind"] != "causal":
        return "-", "-", "-", "-"
    of = quality["metrics"]
    low, high = of["kl"]["low"], of["kl"]["high"]
    return (
        f"{of['perplexity']['value']:.3f}", f"{of['kl']['value']:.5f}", f"{low:.5f}..{high:.5f}",
        f"{of['top1']['value']:.1%}",
    )  # fmt: skip


COMMAND = command
