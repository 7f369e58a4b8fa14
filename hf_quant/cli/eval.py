"""``hf-quant eval``: what a model lost beside the one it was made from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from hf_quant.cli._common import (
    Measuring,
    bars,
    budget,
    check_overlap,
    emit,
    gate_lines,
    gate_options,
    hub,
    measure_options,
    output_options,
    quality_table,
    say,
    store_results,
)
from hf_quant.cli._types import Model
from hf_quant.errors import HfQuantError


@click.command()
@click.argument("model", type=Model())
@click.option("--base", type=Model(), help="The model it was made from; default: the one its recipe.json names.")
@click.option("--device", help="Where to run both: cpu, cuda, auto, ...")
@click.option(
    "--kv-cache", type=click.Choice(["int8", "int4"]), help="Measure it with keys and values kept like that."
)
@click.option("--tasks", help="Tasks of lm-evaluation-harness too, separated by commas.")
@measure_options
@gate_options
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoints bring along.")
@output_options
def command(
    model: str, base: str | None, trust_remote_code: bool, device: str | None, kv_cache: str | None, tasks: str | None, as_json: bool, quiet: bool,
    max_kl: float | None, max_ppl_increase: float | None, min_top1: float | None, **how: Any,
) -> None:  # fmt: skip
    """Measure MODEL against the model it was made from: KL divergence, perplexity, top-1 agreement."""
    measuring = Measuring(**how)

    from hf_quant import load
    from hf_quant.checkpoint.folder import Checkpoint
    from hf_quant.evaluation.layers import layer_errors
    from hf_quant.evaluation.yardstick import Base
    from hf_quant.hf.auto import tokenizer_of

    recipe = _recipe(model)
    base, revision = _base_of(model, recipe, base)
    from_hub, of_base = hub(None, trust_remote_code), hub(revision, trust_remote_code)
    name, text = measuring.find(model, base)
    if not measuring.allow_overlap:
        check_overlap(model, text)
    for each in (model, base):
        if Path(each).is_dir():
            Checkpoint.open(Path(each))
    shown = bars(quiet or as_json)
    tokenizer = tokenizer_of(base, **of_base)
    _same_tokenizer(model, tokenizer, from_hub)
    say(f"measuring {model} against {base} on {name}", quiet)
    measure = measuring.yardstick(base, text, tokenizer, device=device, shown=shown, quiet=quiet, **of_base)
    loaded = load(model, **from_hub, **({"device_map": device} if device else {})).eval()
    measured = _cached(loaded, kv_cache) if kv_cache else loaded
    quality = measure(measured)
    record: dict[str, Any] = {"quality": quality.to_dict()}
    if kv_cache:
        record["kv_cache"] = {"kind": kv_cache, "bytes": measured.nbytes}
    if asked := budget(max_kl, max_ppl_increase, min_top1):
        record["gate"] = asked.verdict(quality)
    record["layers"] = [
        each.to_dict() for each in layer_errors(loaded, Base(base, **of_base).checkpoint(), recipe.get("blocks") or ())
    ]
    if tasks:
        from hf_quant.evaluation.tasks import run_tasks

        record["tasks"] = run_tasks(loaded, tokenizer, tasks.split(","))
    if not kv_cache:  # results.json is about the model alone
        store_results(Path(model), record, lambda line: say(line, quiet))
    human = quality_table(record["quality"])
    missed = gate_lines(record.get("gate", {"misses": []}), record["layers"])
    first = next(iter(quality.metrics.values())) if quality.kind == "encoder" else quality.metrics["kl"]
    emit(as_json, quiet, record=record, essential=f"{first.value:.6g}", human="\n".join([human, *_tasks(record)]))
    for line in missed:
        say(line)
    if missed:
        sys.exit(3)


def _cached(model: Any, kind: str) -> Any:
    from hf_quant.evaluation.cached import Cached

    if not model.can_generate() or model.config.is_encoder_decoder:
        raise HfQuantError(f"--kv-cache: {type(model).__name__} is no causal language model, so it keeps none")
    return Cached(model, kind)


def _tasks(record: dict[str, Any]) -> list[str]:
    return [
        f"{task}: {name} {value:.4g}" for task, each in record.get("tasks", {}).items() for name, value in each.items()
    ]


def _recipe(model: str) -> dict[str, Any]:
    """What ``model`` says of how it was made; empty where it says nothing."""
    file = Path(model) / "recipe.json"
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HfQuantError(f"{file}: {error}") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("source", {}), dict):
        raise HfQuantError(f"{file}: is not a recipe: an object with the object source was expected")
    return stored


def _base_of(model: str, recipe: dict[str, Any], named: str | None) -> tuple[str, str | None]:
    """The base ``named``, or else the one of the recipe; and its commit, where the recipe knows it."""
    source = recipe.get("source", {})
    base = named or source.get("model")
    if base is None:
        raise HfQuantError(f"{model} does not say what it was made from: name it with --base")
    if Path(base).is_dir():
        return str(base), None
    if named is None and "/" not in base:
        raise HfQuantError(f"{model} was made from a folder called {base!r}: say where it is with --base")
    return str(base), source.get("revision") if base == source.get("model") else None


def _same_tokenizer(model: str, base: Any, from_hub: dict[str, Any]) -> None:
    from hf_quant.hf.auto import tokenizer_of

    if any((Path(model) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        own = tokenizer_of(model, **from_hub)
        if own is not None and base is not None and own.get_vocab() != base.get_vocab():
            raise HfQuantError(f"the tokenizer of {model} differs from the base's: their numbers cannot be compared")


COMMAND = command
