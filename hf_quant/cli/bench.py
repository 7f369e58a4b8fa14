"""``hf-quant bench``: memory and speed of a model, beside the one it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._common import bars, emit, output_options, say
from hf_quant.cli._screen import Part
from hf_quant.cli._types import DTYPE, Choice, Device, Model
from hf_quant.errors import HfQuantError, OptionError
from hf_quant.jobs.base import base_of, recipe_of, refuse_itself
from hf_quant.jobs.options import hub
from hf_quant.jobs.results import Grid

if TYPE_CHECKING:
    from hf_quant.jobs.progress import Reporter

FEW = 3  # repeats, at least


@click.command(short_help="Memory and speed, beside the base.")
@click.argument("model", type=Model())
@click.option(
    "--base",
    type=Model(),
    help="Measured too, in turns with MODEL; default: the model its recipe.json names, if it is here.",
)
@click.option("--alone", is_flag=True, help="Measure no base.")
@click.option("--batch", multiple=True, type=click.IntRange(1), default=(1, 4, 16), show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(2), default=32, show_default=True)
@click.option("--repeats", type=click.IntRange(FEW), default=5, show_default=True, help="Besides one to warm up.")
@click.option("--kv-cache", type=Choice("int8", "int4"), help="Keys and values of MODEL like that; the base's stay.")
@click.option("--dtype", type=DTYPE, default="auto", show_default=True)
@click.option("--device", type=Device(), help="Where to run: cpu, cuda, auto, ...")
@click.option(
    "--tune", is_flag=True, help="Only find the fastest tiles of this GPU for MODEL's layers, and keep them."
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings along.")
@output_options
def command(
    model: str, base: str | None, alone: bool, trust_remote_code: bool, batch: tuple[int, ...], prompt_tokens: int, new_tokens: int, repeats: int, dtype: str,
    device: str | None, kv_cache: str | None, tune: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure memory, time to load, and prefill and decode speed of MODEL."""
    from hf_quant.jobs.progress import reporting
    from hf_quant.jobs.stored import check_results, store_beside_base

    if alone and base is not None:
        raise OptionError("--alone measures no base: leave it out, or --base")
    how = {"dtype": dtype} | hub(None, trust_remote_code) | ({"device_map": device} if device else {})
    with reporting(bars(quiet or as_json), lambda line: say(line, quiet)) as report:
        if tune:
            tiles = _tuned(model, dtype, device)
            lines = [f"{name}: dense from {tile['dense'] + 1} rows" for name, tile in tiles.items()]
            emit(as_json, quiet, record={"tiles": tiles}, essential=str(len(tiles)), human="\n".join(lines))
            return
        recipe = recipe_of(model)
        if not kv_cache and base is not None:
            refuse_itself(model, recipe, base)
        check_results(Path(model))
        named = {} if alone else _base(model, recipe, base, how, report)
        record = _measured(
            named | {"model": (model, how)}, batch, kv_cache, prompt_tokens, new_tokens, repeats, report
        )
        store_beside_base(model, recipe, named["base"][0] if named else None, {"bench": record}, report.say)
    decode = record["model"]["speed"][0]["decode"]
    emit(as_json, quiet, record=record, essential=f"{decode:.4g}", human=_human(record, [*named, "model"]))


def _base(
    model: str, recipe: dict[str, Any], named: str | None, how: dict[str, Any], report: Reporter
) -> dict[str, tuple[str, dict[str, Any]]]:
    """The model that MODEL was made from, and how to load it; empty where its recipe names none, or it is not known where that is."""
    if named is None and not recipe:
        return {}
    try:
        base, revision = base_of(model, recipe, named)
    except HfQuantError as error:
        report.say(f"{error}; until then it is measured alone")
        return {}
    return {"base": (base, how | hub(revision, False))}


def _tuned(model: str, dtype: str, device: str | None) -> dict[str, Any]:
    import os

    from hf_quant.bench import gpu
    from hf_quant.hf import load

    gpu.need_gpu()
    return gpu.tune(gpu.layers_of(load(model, dtype=dtype, device_map=device or "cuda")), os.cpu_count() or 1)


def _measured(
    named: dict[str, tuple[str, dict[str, Any]]], batch: tuple[int, ...], kv_cache: str | None, prompt: int,
    new: int, repeats: int, report: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Memory and speed of models, given by their names and how to load them."""
    from hf_quant.bench import memory, speed
    from hf_quant.hf import load
    from hf_quant.hf.auto import hub_options

    for name, how in named.values():
        _check_kind(name, hub_options(how), prompt, new)
    with report.stage("memory and time to load"):
        record: dict[str, Any] = {role: memory.measure(name, **how).to_dict() for role, (name, how) in named.items()}
    with report.stage("loading"):
        models = {role: load(name, **how).eval() for role, (name, how) in named.items()}
    speeds = speed.compare(
        models,
        batch,
        caches={"model": kv_cache},
        prompt=prompt,
        new=new,
        repeats=repeats,
        progress=report.over("speed"),
    )
    for role, measured in speeds.items():
        record[role]["speed"] = [rate.to_dict() for rate in measured]
    record["kv_cache"] = kv_cache or "float"
    record["slower"] = _slower(record) if "base" in named else []
    record["machine"] = _machine()
    return record


def _check_kind(name: str, hub: dict[str, Any], prompt: int, new: int) -> None:
    """Refuse a model that does not continue token ids, or so many of them, before anything is loaded."""
    from hf_quant.hf.auto import other_inputs, positions_of
    from hf_quant.hf.loading import skeleton

    model = skeleton(name, **hub)
    reads_more = other_inputs(type(model), model.config) is not None
    if reads_more or model.config.is_encoder_decoder or not model.can_generate():
        raise HfQuantError(f"{name}: bench measures causal language models, not {type(model).__name__}")
    most = positions_of(model)
    if most and prompt + new > most:
        raise OptionError(
            f"--prompt-tokens {prompt} and --new-tokens {new} are more than the {most:,} positions of {name}: name fewer"
        )


def _slower(record: dict[str, Any]) -> list[str]:
    """A sentence for every speed that is below the base's by more than the spread of both."""
    sentences = []
    for speed, base in zip(record["model"]["speed"], record["base"]["speed"], strict=True):
        for what in ("prefill", "decode"):
            ratio = speed[what] / base[what]
            if ratio < 1 - max(speed[f"{what}_spread"], base[f"{what}_spread"]):
                sentences.append(
                    f"{what} at batch {speed['batch']}: slower than the base here, {ratio:.2f} times its speed"
                )
    return sentences


def _machine() -> dict[str, Any]:
    import platform

    import torch

    from hf_quant.bench.machine import cpu_name

    return {
        "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "cpu": cpu_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }  # fmt: skip


def _human(record: dict[str, Any], roles: list[str]) -> list[Part]:
    head = ("", "weights MB", "peak MB", "load s")
    sizes = [
        (
            role, f"{record[role]['weight_bytes'] / 1e6:.1f}", f"{record[role]['peak_bytes'] / 1e6:.1f}",
            f"{record[role]['load_seconds']:.2f}",
        )
        for role in roles
    ]  # fmt: skip
    speeds = [
        (
            f"{role}, batch {s['batch']}", f"{s['prefill']:.0f} ±{s['prefill_spread'] / 2:.0%}",
            f"{s['decode']:.1f} ±{s['decode_spread'] / 2:.0%}", f"{1000 * s['first_token']:.0f}",
            f"{s['cache_bytes'] / 1e6:.2f}",
        )
        for role in roles
        for s in record[role]["speed"]
    ]  # fmt: skip
    titles = ("", "prefill tokens/s", "decode tokens/s", "first token ms", "KV cache MB")
    return [Grid(head, sizes), "", Grid(titles, speeds), *([""] if record["slower"] else []), *record["slower"]]


COMMAND = command
