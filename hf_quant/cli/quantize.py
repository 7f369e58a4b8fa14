"""``hf-quant quantize``: a model becomes a smaller one in a folder, and the table says what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._common import bars, configs, emit, find_text, output_options, say, scheme_options, table
from hf_quant.errors import HfQuantError

if TYPE_CHECKING:
    from torch import Tensor

    from hf_quant.hf import HfQuantConfig
    from hf_quant.results import Quality

HEAD = ("scheme", "MB", "bits/weight", "quantized", "perplexity", "KL (nats)", "top-1", "seconds")


@dataclass
class _Job:
    """What every scheme of one call shares."""

    model: str
    load: dict[str, Any]  # for from_pretrained
    shard: str
    overwrite: bool
    quiet: bool
    tokenizer: Any
    base: Any = None
    text: str = ""
    max_tokens: int = 0
    bars: bool = False


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, help="Folder of the result; of several schemes, their parent.")
@scheme_options
@click.option("--dtype", default="auto", show_default=True, help="What the model computes in.")
@click.option("--device", help="Where to quantize: cpu, cuda, auto, ...")
@click.option("--revision", help="Of a Hub model.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@click.option("--eval/--no-eval", "measure", default=None, help="Default: where a text is found.")
@click.option("--text", help="UTF-8 file to measure on; default: heldout.txt beside the model.")
@click.option("--max-tokens", default=32768, show_default=True, help="Measure about that many at most.")
@click.option("--prompt", help="Let the saved model continue this.")
@output_options
def command(
    model: str, output: str, dtype: str, device: str | None, revision: str | None, max_shard_size: str,
    overwrite: bool, measure: bool | None, text: str | None, max_tokens: int, prompt: str | None,
    as_json: bool, quiet: bool, **scheme: Any,
) -> None:  # fmt: skip
    """Quantize MODEL, a folder or a Hub id."""
    plans = configs(**scheme)
    shown = bars(quiet or as_json)
    if Path(model).is_dir():
        from hf_quant.checkpoint import Checkpoint

        Checkpoint.open(Path(model))
    file = find_text(text, model) if measure is not False else None
    if measure and file is None:
        raise HfQuantError("no text to measure on: name one with --text")
    from_hub = {"dtype": dtype, "device_map": device, "revision": revision}
    job = _Job(
        model, {k: v for k, v in from_hub.items() if v is not None}, max_shard_size, overwrite, quiet,
        _tokenizer(model, revision), max_tokens=max_tokens, bars=shown,
    )  # fmt: skip
    if file is not None:
        from hf_quant import load
        from hf_quant.evaluation import read_text

        job.text, job.base = read_text(file), load(model, **job.load)
    outs = [Path(output) / p.scheme for p in plans] if len(plans) > 1 else [Path(output)]
    rows = [_one(job, plan, out) for plan, out in zip(plans, outs, strict=True)]
    said = _continue(outs[-1], prompt, job) if prompt else None
    record = {"model": model, "results": rows} | ({"generated": said} if said else {})
    human = table(HEAD, _lines(rows))
    if job.text:
        human += f"\n\nmeasured on {rows[0]['quality']['tokens']:,} held-out tokens of {file.name if file else ''}"
    if said:
        human += f"\n\n{outs[-1]} continues:\n{said}"
    emit(as_json, quiet, record=record, essential="\n".join(map(str, outs)), human=human)


def _one(job: _Job, config: HfQuantConfig, out: Path) -> dict[str, Any]:
    """Quantize with one scheme, check what was written, and only then let it appear."""
    import torch

    from hf_quant import load
    from hf_quant.checkpoint import staged, write_json

    asked = {"overrides": dict(config.overrides), "modules_to_not_convert": list(config.modules_to_not_convert)}
    with staged(out, overwrite=job.overwrite) as stage:
        start = time.perf_counter()
        made = load(job.model, quantization_config=config, **job.load)
        seconds = time.perf_counter() - start
        plan = made.hf_quantizer.plan
        say(f"{config.scheme}: {plan.summary()}", job.quiet)
        made.save_pretrained(stage, max_shard_size=job.shard)
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(stage)
        write_json(stage / "recipe.json", _recipe(job, config, asked, made))
        again = load(str(stage), dtype=made.dtype)
        if not torch.equal(_logits(again), _logits(made)):
            raise HfQuantError(f"{config.scheme}: the saved model computes something else than the one in memory")
        row: dict[str, Any] = {
            "scheme": config.scheme, "folder": out.name, "format": plan.format, "share_quantized": plan.share,
            "bits_per_weight": plan.bits_per_weight, "bytes": sum(f.stat().st_size for f in stage.glob("*.safetensors")),
            "base_bytes": plan.bytes_float, "seconds": seconds, "date": str(date.today()),
        }  # fmt: skip
        if job.text:
            row["quality"] = _measure(job, made).to_dict()
        write_json(stage / "results.json", row)
    return row


def _measure(job: _Job, model: Any) -> Quality:
    from tqdm import tqdm

    from hf_quant.evaluation import evaluate

    return evaluate(
        model, job.base, job.tokenizer, job.text, max_tokens=job.max_tokens,
        progress=lambda batches: tqdm(batches, desc="eval", disable=not job.bars),
    )  # fmt: skip


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
    quality = rows[0].get("quality")
    base = f"{quality['base_perplexity']:.3f}" if quality else "-"
    yield "base", f"{rows[0]['base_bytes'] / 1e6:.1f}", "-", "-", base, "-", "-", "-"
    for row in rows:
        quality = row.get("quality")
        measured = (
            (f"{quality['perplexity']:.3f}", f"{quality['kl_mean']:.5f}", f"{quality['top1']:.1%}")
            if quality
            else ("-", "-", "-")
        )
        size = (f"{row['bytes'] / 1e6:.1f}", f"{row['bits_per_weight']:.2f}", f"{row['share_quantized']:.1%}")
        yield row["scheme"], *size, *measured, f"{row['seconds']:.1f}"


COMMAND = command
