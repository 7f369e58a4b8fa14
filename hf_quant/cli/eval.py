"""``hf-quant eval``: perplexity and KL to the base on held-out text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hf_quant.cli._common import bars, emit, find_text, output_options, say, table
from hf_quant.errors import HfQuantError


@click.command()
@click.argument("model")
@click.option("--base", help="The model it was made from; default: the one its recipe.json names.")
@click.option("--text", help="UTF-8 file; default: heldout.txt beside the model or the base.")
@click.option("--context", default=512, show_default=True, help="Tokens in a window.")
@click.option("--max-tokens", type=int, help="Measure about that many at most.")
@output_options
def command(
    model: str, base: str | None, text: str | None, context: int, max_tokens: int | None, as_json: bool, quiet: bool
) -> None:
    """Measure MODEL against the model it was made from."""
    from transformers import AutoTokenizer

    from hf_quant import load
    from hf_quant.checkpoint import Checkpoint, write_json
    from hf_quant.evaluation import evaluate, read_text

    base = base or _source(model)
    file = find_text(text, model, base)
    if file is None:
        raise HfQuantError("no text to measure on: name one with --text")
    for name in (model, base):
        if Path(name).is_dir():
            Checkpoint.open(Path(name))
    shown = bars(quiet or as_json)
    tokenizer = AutoTokenizer.from_pretrained(base)
    _same_tokenizer(model, tokenizer)
    say(f"measuring {model} against {base} on {file.name}", quiet)
    from tqdm import tqdm

    quality = evaluate(
        load(model), load(base), tokenizer, read_text(file), context=context, max_tokens=max_tokens,
        progress=lambda batches: tqdm(batches, desc="eval", disable=not shown),
    )  # fmt: skip
    record = quality.to_dict()
    if Path(model).is_dir():
        path = Path(model) / "results.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        write_json(path, known | {"quality": record})
    rows = [(name, f"{value:.5g}" if isinstance(value, float) else str(value)) for name, value in record.items()]
    emit(as_json, quiet, record=record, essential=f"{quality.kl_mean:.6g}", human=table(("measure", "value"), rows))


def _source(model: str) -> str:
    recipe: Any = Path(model) / "recipe.json"
    source = json.loads(recipe.read_text()).get("source", {}).get("model") if recipe.is_file() else None
    if source is None:
        raise HfQuantError(f"{model} does not say what it was made from: name it with --base")
    if Path(source).is_dir() or "/" in source:
        return str(source)
    raise HfQuantError(f"{model} was made from a folder called {source!r}: say where it is with --base")


def _same_tokenizer(model: str, base: Any) -> None:
    from transformers import AutoTokenizer

    if any((Path(model) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        own = AutoTokenizer.from_pretrained(model)
        if own.get_vocab() != base.get_vocab():
            raise HfQuantError(f"the tokenizer of {model} differs from the base's: their numbers cannot be compared")


COMMAND = command
