"""``hf-quant quantize``: a model becomes a smaller one in a folder, and the table says what it cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._common import (
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
    table,
)
from hf_quant.errors import HfQuantError

if TYPE_CHECKING:
    from torch import Tensor

    from hf_quant.evaluation.gate import Budget
    from hf_quant.hf import HfQuantConfig
    from hf_quant.results import Quality

HEAD = ("scheme", "MB", "bits/weight", "quantized", "perplexity", "KL (nats)", "95 % interval", "top-1", "seconds")
SMALL = 1_000_000_000  # parameters
TOKENS = 32768  # measured by default: enough for intervals, and soon done


@dataclass
class _Job:
    """What every scheme of one call shares."""

    model: str
    load: dict[str, Any]  # for from_pretrained
    shard: str
    overwrite: bool
    quiet: bool
    tokenizer: Any
    budget: Budget
    measure: Callable[[Any], Quality] | None = None


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, help="Folder of the result; of several schemes, their parent.")
@scheme_options
@click.option("--dtype", default="auto", show_default=True, help="What the model computes in.")
@click.option("--device", help="Where to quantize: cpu, cuda, auto, ...")
@click.option("--revision", help="Of a Hub model.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@click.option("--eval/--no-eval", "wanted", default=None, help="Measure the result; default: where a text is found.")
@measure_options
@gate_options
@click.option("--prompt", help="Let the saved model continue this.")
@output_options
def command(
    model: str, output: str, dtype: str, device: str | None, revision: str | None, max_shard_size: str, overwrite: bool,
    wanted: bool | None, text: str | None, dataset: str | None, context: int | None, stride: int | None,
    max_tokens: int | None, base_dtype: str, allow_overlap: bool, max_kl: float | None, max_ppl_increase: float | None,
    min_top1: float | None, prompt: str | None, as_json: bool, quiet: bool, **scheme: Any,
) -> None:  # fmt: skip
    """Quantize MODEL, a folder or a Hub id."""
    plans, gate = configs(**scheme), budget(max_kl, max_ppl_increase, min_top1)
    _refuse_two_bits(plans, gate)
    shown = bars(quiet or as_json)
    if Path(model).is_dir():
        from hf_quant.checkpoint import Checkpoint

        Checkpoint.open(Path(model))
        _warn_if_training(Path(model))
    how = Measuring(text, dataset, context, stride, max_tokens or TOKENS, base_dtype, allow_overlap)
    found = how.find(model) if wanted is not False else None
    if found is None and (wanted or gate):
        raise HfQuantError("no text to measure on: name one with --text")
    from_hub = {"dtype": dtype, "device_map": device, "revision": revision}
    given = {k: v for k, v in from_hub.items() if v is not None}
    job = _Job(model, given, max_shard_size, overwrite, quiet, _tokenizer(model, revision), gate)
    outs = [Path(output) / p.scheme for p in plans] if len(plans) > 1 else [Path(output)]
    if found is not None:
        job.measure = how.yardstick(
            model, found[1], job.tokenizer, revision=revision, device=device, shown=shown, quiet=quiet
        )
    rows = [_one(job, plan, out) for plan, out in zip(plans, outs, strict=True)]
    missed = [line for row in rows for line in gate_lines(row.get("gate", {"misses": []}), row["layers"])]
    folders = [out.with_name(row["folder"]) for row, out in zip(rows, outs, strict=True)]
    said = _continue(folders[-1], prompt, job) if prompt else None
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


class _GateMissedError(Exception):
    """Unwinds the stage of the folder that a model may not have."""


def _one(job: _Job, config: HfQuantConfig, out: Path) -> dict[str, Any]:
    """Quantize with one scheme and check what was written; it appears as ``out``, or as ``out-failed`` past the gate."""
    import torch

    from hf_quant import load
    from hf_quant.checkpoint import staged, write_json

    asked = {"overrides": dict(config.overrides), "modules_to_not_convert": list(config.modules_to_not_convert)}
    row: dict[str, Any] = {}
    with suppress(_GateMissedError), staged(out, overwrite=job.overwrite) as stage:
        start = time.perf_counter()
        made = load(job.model, quantization_config=config, **job.load).eval()
        seconds = time.perf_counter() - start
        plan = made.hf_quantizer.plan
        say(f"{config.scheme}: {plan.summary()}", job.quiet)
        if plan.params < SMALL:
            say(f"{plan.params / 1e6:.0f}M parameters: small models lose more; look at the numbers", job.quiet)
        made.save_pretrained(stage, max_shard_size=job.shard)
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(stage)
        write_json(stage / "recipe.json", _recipe(job, config, asked, made))
        again = load(str(stage), dtype=made.dtype)
        if not torch.equal(_logits(again), _logits(made)):
            raise HfQuantError(f"{config.scheme}: the saved model computes something else than the one in memory")
        del again
        row |= {
            "scheme": config.scheme, "folder": out.name, "format": plan.format, "share_quantized": plan.share,
            "bits_per_weight": plan.bits_per_weight, "bytes": sum(f.stat().st_size for f in stage.glob("*.safetensors")),
            "base_bytes": plan.bytes_float, "parameters": plan.params, "seconds": seconds, "date": str(date.today()),
        }  # fmt: skip
        row |= _measured(job, made)
        if row.get("gate", {}).get("misses"):
            row["folder"] = f"{out.name}-failed"
        write_json(stage / "results.json", row)
        if row["folder"] != out.name:
            with staged(out.with_name(row["folder"]), overwrite=True) as aside:
                for file in stage.iterdir():
                    file.rename(aside / file.name)
            raise _GateMissedError
    return row


def _measured(job: _Job, model: Any) -> dict[str, Any]:
    """Quality and gate where there is a text to measure on, and how far each layer is from the base's."""
    from hf_quant.evaluation.layers import layer_errors
    from hf_quant.evaluation.yardstick import Base

    errors = layer_errors(model, Base(job.model, job.load.get("revision")).checkpoint())
    made: dict[str, Any] = {"layers": [each.to_dict() for each in errors]}
    if job.measure is not None:
        quality = job.measure(model)
        made["quality"] = quality.to_dict()
        if job.budget:
            made["gate"] = job.budget.verdict(quality)
    return made


def _recipe(job: _Job, config: HfQuantConfig, asked: dict[str, Any], model: Any) -> dict[str, Any]:
    """How the model was made; of a local source only the folder's name."""
    from importlib.metadata import version

    plan, local = model.hf_quantizer.plan, Path(job.model).is_dir()
    source: dict[str, str | None] = {"model": Path(job.model).resolve().name if local else job.model}
    source["revision"] = None if local else getattr(model.config, "_commit_hash", None)
    return {
        "scheme": config.scheme, "method": config.method, "format": plan.format, "format_reason": plan.format_reason,
        "asked": asked, "source": source, "dtype": str(model.dtype).removeprefix("torch."),
        "share_quantized": plan.share, "bits_per_weight": plan.bits_per_weight,
        "schemes": {name: str(scheme) for name, scheme in plan.schemes.items()},
        "left": plan.left, "regrouped": plan.regrouped,
        "versions": {name: version(name) for name in ("hf-quant", "torch", "transformers", "safetensors")},
    }  # fmt: skip


def _logits(model: Any) -> Tensor:
    """Of a few tokens, or of whatever else the model gives for them."""
    import torch

    ids = torch.arange(3, 19, device=model.device)[None] % model.config.get_text_config().vocab_size
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        made: Tensor = model(input_ids=ids, **extra)[0]
    return made


def _tokenizer(model: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError, KeyError):
        say(f"{model}: no tokenizer found, none is saved")
        return None


def _continue(folder: Path, prompt: str, job: _Job) -> str:
    """Greedy, from the folder that was written."""
    import torch

    from hf_quant import load

    if job.tokenizer is None:
        raise HfQuantError("--prompt needs a tokenizer")
    model, ids = load(str(folder)), torch.tensor([job.tokenizer(prompt).input_ids])
    out = model.generate(ids.to(model.device), max_new_tokens=40, do_sample=False)
    made: str = job.tokenizer.decode(out[0], skip_special_tokens=True)
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
