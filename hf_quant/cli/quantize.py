"""``hf-quant quantize``: a model becomes a smaller one in a folder, and the table says what it cost."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._calibrated import blocks_shown, calibration_for, calibration_options, looks_at_text
from hf_quant.cli._common import (
    Measuring,
    bars,
    budget,
    configs,
    emit,
    find_calibration,
    gate_lines,
    gate_options,
    hub,
    measure_options,
    measured_on,
    model_options,
    output_options,
    say,
    scheme_options,
    schemes,
    table,
)
from hf_quant.cli._types import DTYPE, Model, Size
from hf_quant.errors import HfQuantError
from hf_quant.jobs.outputs import check_places, work_folder

if TYPE_CHECKING:
    pass

HEAD = ("scheme", "MB", "bits/weight", "quantized", "perplexity", "KL (nats)", "95 % interval", "top-1", "seconds")
TOKENS = 32768  # measured by default: enough for intervals, and soon done


@click.command()
@click.argument("model", type=Model())
@click.option("-o", "--output", required=True, help="Folder of the result; of several schemes, their parent.")
@scheme_options
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="What the model computes in.")
@click.option("--device", help="Where to quantize: cpu, cuda, auto, ...")
@model_options
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest file of weights.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@click.option(
    "--eval/--no-eval",
    "wanted",
    default=None,
    help="Measure the result; default: if there is a gate, --text, or heldout.txt beside the model.",
)
@calibration_options
@measure_options
@gate_options
@click.option("--prompt", help="Let the saved model continue this.")
@output_options
def command(
    model: str, output: str, dtype: str, device: str | None, revision: str | None, trust_remote_code: bool,
    max_shard_size: int, overwrite: bool,
    wanted: bool | None, calibration: str | None, calibration_tokens: int, max_memory: int | None, text: str | None, dataset: str | None, context: int | None, stride: int | None,
    max_tokens: int | None, base_dtype: str, allow_overlap: bool, max_kl: float | None, max_ppl_increase: float | None,
    min_top1: float | None, prompt: str | None, as_json: bool, quiet: bool,
    scheme: tuple[str, ...], bits: int | None, group_size: int | None, asym: bool, **options: Any,
) -> None:  # fmt: skip
    """Quantize MODEL, a folder or a Hub id."""
    slugs, gated = schemes(scheme, bits, group_size, asym), (max_kl, max_ppl_increase, min_top1) != (None,) * 3
    how = Measuring(text, dataset, context, stride, max_tokens or TOKENS, base_dtype, allow_overlap)
    _refuse_measuring(wanted, gated, how)
    _refuse_two_bits([*slugs, *(slug for _, slug in options["override"] if slug)], gated)
    source = find_calibration(calibration, model)
    calibrated = looks_at_text(options["method"], slugs, calibration)
    outs = [Path(output) / slug for slug in slugs] if len(slugs) > 1 else [Path(output)]
    inputs = list(filter(None, (text, dataset, source)))
    check_places(outs, [model, *inputs], overwrite=overwrite, gate=gated)

    from hf_quant.data.text import refuse_overlap
    from hf_quant.hf.auto import tokenizer_of
    from hf_quant.hf.loading import refuse_quantized
    from hf_quant.jobs.compress import Job, compress
    from hf_quant.solve.ranks import Ranks

    plans, gate = configs(slugs, **options), budget(max_kl, max_ppl_increase, min_top1)
    from_hub = hub(revision, trust_remote_code)
    ranks = Ranks.found()
    quiet = quiet or not ranks.first
    shown = bars(quiet or as_json)
    if Path(model).is_dir():
        from hf_quant.checkpoint.folder import Checkpoint

        Checkpoint.open(Path(model))
        _warn_if_training(Path(model))
    refuse_quantized(model, **from_hub)
    tokenizer = tokenizer_of(model, **from_hub)
    if tokenizer is None:
        say(f"{model}: no tokenizer found, none is saved")
    calibrated_on = calibration_for(model, source, calibration_tokens, tokenizer, from_hub) if calibrated else None
    always = wanted or gate or calibrated_on is not None
    found = None if wanted is False or not ranks.first else how.find(model) if always else how.beside(model)
    given = {"dtype": dtype} | ({"device_map": device} if device else {}) | from_hub
    measure = None
    if found is not None and calibrated_on is not None and not allow_overlap:
        refuse_overlap(found[1], calibrated_on.paragraphs)
    if found is not None:
        measure = how.yardstick(model, found[1], tokenizer, device=device, shown=shown, quiet=quiet, **from_hub)
    job = Job(
        model, given, max_shard_size, overwrite, lambda line: say(line, quiet), tokenizer, gate, measure, calibrated_on,
        lambda blocks: blocks_shown(blocks, shown), max_memory, ranks, inputs,
    )  # fmt: skip
    with _resumable({out: plan.scheme for plan, out in zip(plans, outs, strict=True)}):
        rows = [compress(job, plan, out) for plan, out in zip(plans, outs, strict=True)]
    if not ranks.first:
        return
    missed = [line for row in rows for line in gate_lines(row.get("gate", {"misses": []}), row["layers"])]
    folders = [out.with_name(row["folder"]) for row, out in zip(rows, outs, strict=True)]
    said = _continue(folders[-1], prompt, tokenizer, trust_remote_code) if prompt else None
    record = {"model": model, "results": rows} | ({"generated": said} if said else {})
    human = table(HEAD, _lines(rows))
    if found is not None:
        human += f"\n\n{measured_on(rows[0]['quality'], found[0])}"
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
    from hf_quant.disk.journal import is_journal

    try:
        yield
    except (KeyboardInterrupt, OSError):
        for out, scheme in schemes.items():
            if is_journal(work_folder(out)):
                only = f" with --scheme {scheme} -o {out}" if len(schemes) > 1 else ""
                say(f"{work_folder(out)} holds the finished blocks: the same command{only} goes on from there")
        raise


def _refuse_measuring(wanted: bool | None, gated: bool, how: Measuring) -> None:
    if wanted is False and gated:
        raise click.UsageError("a gate has to measure: it cannot go with --no-eval")
    if wanted is False and (how.text or how.dataset):
        raise click.UsageError("--text and --dataset say what to measure on: they cannot go with --no-eval")


def _refuse_two_bits(slugs: Sequence[str], gated: bool) -> None:
    from hf_quant.core.scheme import QuantScheme

    two = next((slug for slug in slugs if QuantScheme.parse(slug).bits == 2), None)
    if two is not None and not gated:
        raise click.UsageError(
            f"{two}: 2 bits break most models, so they need a gate: say what it may cost, for example --max-kl 0.1"
        )


def _warn_if_training(folder: Path) -> None:
    found = [name for name in ("optimizer.pt", "optimizer.bin", "scheduler.pt") if (folder / name).is_file()]
    if found:
        say(
            f"{folder}: {found[0]} lies beside the model, so it may still be training; quantize last, or train with QAT"
        )


def _continue(folder: Path, prompt: str, tokenizer: Any, trust_remote_code: bool) -> str:
    """Greedy, from the folder that was written."""
    import torch

    from hf_quant import load

    if tokenizer is None:
        raise HfQuantError("--prompt needs a tokenizer")
    model = load(str(folder), trust_remote_code=trust_remote_code)
    ids = torch.tensor([tokenizer(prompt).input_ids])
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
    from hf_quant.evaluation.results import interval_shown

    if quality is None or quality["kind"] != "causal":
        return "-", "-", "-", "-"
    of = quality["metrics"]
    return (
        f"{of['perplexity']['value']:.3f}", f"{of['kl']['value']:.5f}", interval_shown(of["kl"], "{:.5f}".format, ".."),
        f"{of['top1']['value']:.1%}",
    )  # fmt: skip


COMMAND = command
