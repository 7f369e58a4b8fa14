"""``hf-quant ladder``: the smallest model inside a quality budget, or the best one inside a size."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._calibrated import blocks_shown, calibration_for, calibration_options, looks_at_text
from hf_quant.cli._common import (
    CALIBRATION,
    Measuring,
    bars,
    budget,
    emit,
    find_calibration,
    gate_options,
    hub,
    measure_options,
    measured_on,
    model_options,
    output_options,
    say,
    table,
)
from hf_quant.cli._types import DTYPE, Method, Model, Size
from hf_quant.jobs.outputs import check_places

if TYPE_CHECKING:
    from hf_quant.evaluation.yardstick import Base

HEAD = ("model", "MB", "bits/weight", "KL (nats)", "95 % interval", "perplexity", "top-1", "tokens/s", "")
TOKENS, TRIAL_TOKENS = 32768, 4096


@click.command()
@click.argument("model", type=Model())
@click.option("-o", "--output", required=True, help="Folder of the chosen model.")
@click.option("--max-size", type=Size(), help="Bytes of all weights, such as 4GB; alone: the best model inside it.")
@gate_options
@click.option("--group-size", type=int, default=128, show_default=True, help="Columns that share a scale.")
@click.option("--asym", is_flag=True, help="With zero points.")
@click.option(
    "--int8-activations", is_flag=True, help="W8A8 and W4A8 on the way down, for speed in prefill and batches."
)
@click.option("--method", type=Method(), default="rtn", show_default=True, help="How codes are chosen.")
@click.option("--ignore", multiple=True, metavar="GLOB", help="Layers to leave in floating point.")
@click.option("--lm-head", is_flag=True, help="Quantize the output head too.")
@click.option("--embeddings", is_flag=True, help="Quantize the input embeddings too.")
@calibration_options
@measure_options
@click.option("--trial-text", help="UTF-8 file for sensitivities; default: calibration.txt beside the model.")
@click.option(
    "--trial-tokens", type=click.IntRange(1), default=TRIAL_TOKENS, show_default=True, help="How much of it."
)
@click.option("--dtype", type=DTYPE, default="auto", show_default=True, help="What the models compute in.")
@click.option("--device", help="Where to run: cpu, cuda, auto, ...")
@model_options
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest file of weights.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@output_options
def command(
    model: str, output: str, max_size: int | None, max_kl: float | None, max_ppl_increase: float | None,
    min_top1: float | None, group_size: int, asym: bool, int8_activations: bool, method: str, ignore: tuple[str, ...], lm_head: bool,
    embeddings: bool, calibration: str | None, calibration_tokens: int, max_memory: int | None, text: str | None, dataset: str | None, context: int | None, stride: int | None,
    max_tokens: int | None, base_dtype: str, allow_overlap: bool, trial_text: str | None, trial_tokens: int, dtype: str,
    device: str | None, revision: str | None, trust_remote_code: bool, max_shard_size: int, overwrite: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Walk MODEL down the precision ladder and keep the smallest one inside the budget."""
    out, gated = Path(output), (max_kl, max_ppl_increase, min_top1) != (None,) * 3
    if not gated and max_size is None:
        raise click.UsageError("say what to keep: --max-kl, --max-ppl-increase, --min-top1 or --max-size")
    source = find_calibration(calibration, model)
    calibrated = looks_at_text(method, _slugs(group_size, asym, int8_activations), calibration)
    inputs = list(filter(None, (text, dataset, trial_text, calibration)))
    check_places([out], [model, *inputs], overwrite=overwrite, gate=gated)

    import torch
    from tqdm import tqdm

    from hf_quant.data.text import refuse_overlap
    from hf_quant.errors import HfQuantError
    from hf_quant.evaluation.yardstick import Base
    from hf_quant.hf.auto import tokenizer_of
    from hf_quant.hf.loading import refuse_quantized
    from hf_quant.jobs.compress import Job, compress
    from hf_quant.jobs.walk import Ladder, Limits, rungs

    from_hub, shown = hub(revision, trust_remote_code), bars(quiet or as_json)
    refuse_quantized(model, **from_hub)
    base = Base(model, revision, getattr(torch, base_dtype), device, trust_remote_code)
    if not base.causal():
        raise HfQuantError(
            f"{model} is no causal language model, and the ladder goes by its predictions: use quantize"
        )
    how = Measuring(text, dataset, context, stride, max_tokens or TOKENS, base_dtype, allow_overlap)
    name, whole = how.find(model)
    choosing, held_back = _parts(whole, quiet)
    tokenizer = tokenizer_of(model, **from_hub)
    looked_at = calibration_for(model, source, calibration_tokens, tokenizer, from_hub) if calibrated else None
    if looked_at is not None and not allow_overlap:
        refuse_overlap(whole, looked_at.paragraphs)

    def measure_on(part: str) -> Any:
        return how.yardstick(model, part, tokenizer, device=device, shown=shown, quiet=quiet, **from_hub)

    limits = Limits(budget(max_kl, max_ppl_increase, min_top1), max_size, 2.0 if held_back else 1.0)
    given = {"dtype": dtype} | ({"device_map": device} if device else {}) | from_hub
    job = Job(
        model, given, max_shard_size, overwrite, lambda line: say(line, quiet), tokenizer, limits.budget,
        measure_on(choosing), looked_at, lambda blocks: blocks_shown(blocks, shown), max_memory, inputs=inputs,
    )  # fmt: skip
    options = {
        "method": method, "modules_to_not_convert": list(ignore), "quantize_lm_head": lm_head,
        "quantize_embeddings": embeddings,
    } | ({} if looked_at is None else {"calibration": looked_at.ids})  # fmt: skip
    walk = Ladder(
        job, limits, rungs(group_size, not asym, int8_activations), options, base.load,
        lambda: _trial(base, tokenizer, choosing, trial_text, trial_tokens, quiet),
        lambda trials: tqdm(trials, desc="sensitivity", disable=not shown),
    ).walk()  # fmt: skip
    record = walk.to_dict() | {"limits": asdict(limits.budget) | {"max_size": max_size}, "held_back": None}
    folder = None
    if walk.chosen is not None:
        assert walk.chosen.config is not None
        record["chosen_bytes"] = walk.chosen.bytes
        last = replace(job, finish=lambda stage, row: _finish(stage, record, row, held_back is not None, quiet))
        if held_back is not None:
            last = replace(last, measure=measure_on(held_back))
        folder = out.with_name(compress(last, walk.chosen.config, out)["folder"])
    emit(as_json, quiet, record=record, essential=str(folder or ""), human=_human(record, name, folder))
    if folder is None or folder.name != out.name:
        _say_what_missed(record, folder)
        sys.exit(3)


def _say_what_missed(record: dict[str, Any], folder: Path | None) -> None:
    for rung in record["rungs"]:
        for miss in rung["misses"]:
            say(f"{rung['name']}: {miss}")
    if folder is not None and record["held_back"]:
        say(f"{folder}: on documents that chose nothing, {record['chosen']} is out of the budget")


def _slugs(group_size: int, asym: bool, int8_activations: bool) -> list[str]:
    """Of the rungs, as `hf_quant.jobs.walk.rungs` makes them; no torch is needed to know whether text is looked at."""
    from hf_quant.core.scheme import QuantScheme

    plain = [str(QuantScheme(bits, group_size, not asym)) for bits in (8, 4, 3, 2)]
    return [*plain, "W8A8"] if int8_activations else plain


def _parts(text: str, quiet: bool) -> tuple[str, str | None]:
    """Documents that choose, and documents that are held back to measure what was chosen."""
    from hf_quant.data.text import halves, split
    from hf_quant.evaluation.results import FEWEST_DOCUMENTS

    documents = len(split(text))
    if documents >= 2 * FEWEST_DOCUMENTS:
        return halves(text)
    say(
        f"the text has {documents} documents: with fewer than {2 * FEWEST_DOCUMENTS} none are held back, so the model is "
        "chosen and measured on the same ones, which flatters it",
        quiet,
    )
    return text, None


def _finish(stage: Path, record: dict[str, Any], row: dict[str, Any], held_back: bool, quiet: bool) -> dict[str, Any]:
    """Write the walk and its pictures beside the model before that appears; returns what results.json holds of it."""
    from hf_quant.disk.atomic import write_bytes, write_json
    from hf_quant.publish import charts

    record |= {"folder": row["folder"], "held_back": row["quality"] if held_back else None}
    write_json(stage / "ladder.json", record)
    if (reason := charts.available()) is not None:
        say(reason, quiet)
    else:
        for name, draw in (("size_and_kl", charts.size_and_kl), ("sensitivity", charts.sensitivity)):
            if name != "sensitivity" or record["sensitivity"]["kl"]:
                for dark in (False, True):
                    write_bytes(stage / f"{name}-{'dark' if dark else 'light'}.png", draw(record, dark))
    return {"ladder": {key: record[key] for key in ("rungs", "chosen", "chosen_bytes", "limits", "held_back")}}


def _human(record: dict[str, Any], name: str, folder: Path | None) -> str:
    from hf_quant.evaluation.results import interval_shown

    lines = [table(HEAD, _lines(record)), "", measured_on(record["rungs"][1]["quality"], name)]
    if folder is None:
        return "\n".join([*lines, "no rung is inside the limits"])
    lines.append(f"chosen: {record['chosen']}, in {folder.name}")
    if (again := record["held_back"]) is not None:
        kl = again["metrics"]["kl"]
        lines.append(
            f"measured again on {again['tokens']:,} tokens of {again['documents']} documents that chose nothing: "
            f"KL {kl['value']:.5f} ({interval_shown(kl, '{:.5f}'.format, '..')})"
        )
    return "\n".join(lines)


def _trial(base: Base, tokenizer: Any, measured_on: str, trial_text: str | None, tokens: int, quiet: bool) -> Any:
    """The base's word on a text that the result is not measured on, if there is one."""
    from hf_quant.cli._common import find_text
    from hf_quant.data.text import read_text

    beside = Path(base.model) / CALIBRATION
    file = find_text(trial_text) or (beside if beside.is_file() else None)
    if file is None:
        say("sensitivities are measured on the held-out text itself: --trial-text names another", quiet)
    return base.reference(tokenizer, read_text(file) if file else measured_on, max_tokens=tokens, noise=False)


def _lines(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Largest first; the base in bf16 has the noise floor for its quality."""
    from hf_quant.evaluation.results import interval_shown

    made: list[tuple[str, ...]] = []
    for rung in sorted(record["rungs"], key=lambda rung: -rung["bytes"]):
        of = (rung["quality"] or record["rungs"][1]["quality"])["metrics"]
        value = "value" if rung["quality"] else "noise"
        kl, perplexity, top1 = (of[name][value] for name in ("kl", "perplexity", "top1"))
        interval = interval_shown(of["kl"], "{:.5f}".format, "..") if rung["quality"] else "noise floor"
        quality = ("-", "-", "-", "-")
        if kl is not None:
            quality = (f"{kl:.5f}", interval, f"{perplexity:.3f}", f"{top1:.1%}")
        mark = "out" if rung["misses"] else ""
        if rung["name"] == record["chosen"] and rung["bytes"] == record.get("chosen_bytes"):
            mark = "chosen"
        size_of = (f"{rung['bytes'] / 1e6:.1f}", f"{rung['bits_per_weight']:.2f}")
        made.append((rung["name"], *size_of, *quality, f"{rung['speed']['decode']:.0f}", mark))
    return made


COMMAND = command
