"""Options and output that commands share."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._types import FORMAT, Limit, Method, Override, Scheme, Share
from hf_quant.errors import HfQuantError, printable

if TYPE_CHECKING:
    from hf_quant.evaluation.gate import Budget
    from hf_quant.evaluation.results import Quality
    from hf_quant.hf import HfQuantConfig

Function = Callable[..., Any]
LOCKED = 60  # seconds to wait for another process that adds to the same results.json
TEXT, CALIBRATION = "heldout.txt", "calibration.txt"  # what a model's folder may bring along


def output_options(function: Function) -> Function:
    """``--json`` and ``-q``, as in ``hf``."""
    function = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(function)
    return click.option("-q", "--quiet", is_flag=True, help="Only the essential value on stdout.")(function)


def scheme_options(function: Function) -> Function:
    """Everything that makes an `HfQuantConfig`."""
    for option in (
        click.option("--embeddings", is_flag=True, help="Quantize the input embeddings too."),
        click.option("--lm-head", is_flag=True, help="Quantize the output head too."),
        click.option("--override", multiple=True, metavar="GLOB=SCHEME", type=Override(),
                     help="Another scheme for some layers; float leaves them in floating point."),
        click.option("--ignore", multiple=True, metavar="GLOB", help="Layers to leave in floating point."),
        click.option("--format", "fmt", type=FORMAT, metavar="NAME", default="auto",
                     help="auto, native or compressed-tensors."),
        click.option("--method", type=Method(), default="rtn", show_default=True, help="How codes are chosen."),
        click.option("--asym", is_flag=True, help="With zero points."),
        click.option("--group-size", type=int, help="Columns that share a scale; -1: a whole row. Default: 128."),
        click.option("--bits", type=int, help="8, 4, 3 or 2. Default: 4."),
        click.option("--scheme", multiple=True, metavar="SLUG", type=Scheme(),
                     help="For example W4A16-g128; in place of --bits, --group-size and --asym."),
    ):  # fmt: skip
        function = option(function)
    return function


def model_options(function: Function) -> Function:
    """Where a model comes from, and whether its code may run."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings along."),
        click.option("--revision", help="Of a Hub model."),
    ):
        function = option(function)
    return function


def hub(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """The `model_options` as arguments of ``from_pretrained``."""
    return ({"revision": revision} if revision else {}) | ({"trust_remote_code": True} if trust_remote_code else {})


def gate_options(function: Function) -> Function:
    """What quantization may cost; a miss exits with 3."""
    for option in (
        click.option("--min-top1", type=Share(most=1), help="Gate: top-1 agreement with the base, such as 95%."),
        click.option("--max-ppl-increase", type=Share(), help="Gate: perplexity over the base's, such as 1%."),
        click.option("--max-kl", type=Limit(), help="Gate: KL divergence to the base, nats per token, such as 0.02."),
    ):
        function = option(function)
    return function


def measure_options(function: Function) -> Function:
    """What to measure on, and how."""
    for option in (
        click.option("--allow-overlap", is_flag=True, help="Measure even on text that was calibrated on."),
        click.option("--base-dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
                     show_default=True, help="What the base computes in while it is the yardstick."),
        click.option("--max-tokens", type=click.IntRange(1), help="Measure about that many at most."),
        click.option("--stride", type=click.IntRange(1), help="Tokens from one window to the next; default: the context."),
        click.option("--context", type=click.IntRange(2), help="Tokens in a window; default: 512, or what the model allows."),
        click.option("--dataset", help="ID[:CONFIG][@SPLIT][#COLUMN] of a datasets set, in place of --text."),
        click.option("--text", help="UTF-8 file to measure on; default: heldout.txt beside the model or its base, else a bundled one."),
    ):  # fmt: skip
        function = option(function)
    return function


@dataclass(frozen=True)
class Measuring:
    """The `measure_options` as given."""

    text: str | None
    dataset: str | None
    context: int | None
    stride: int | None
    max_tokens: int | None
    base_dtype: str
    allow_overlap: bool

    def __post_init__(self) -> None:
        if self.text is not None and self.dataset is not None:
            raise click.UsageError("--text and --dataset name two texts to measure on: give one of them")
        if self.stride is not None and self.context is not None and self.stride > self.context:
            raise click.UsageError(f"--stride {self.stride} is more than --context {self.context}")
        find_text(self.text)

    def beside(self, *folders: str) -> tuple[str, str] | None:
        """Name and content of the text to measure on: the one named, or the one in ``folders``; None if there is none."""
        from hf_quant.data.text import read_dataset, read_text

        if self.dataset is not None:
            return self.dataset, read_dataset(self.dataset)
        file = find_text(self.text, *folders)
        return None if file is None else (file.name, read_text(file))

    def find(self, *folders: str) -> tuple[str, str]:
        """The same, or else the bundled text."""
        from hf_quant.data.text import BUNDLED, read_text

        return self.beside(*folders) or ("the bundled text (documentation of Python)", read_text(BUNDLED))

    def yardstick(
        self,
        base: str,
        text: str,
        tokenizer: Any,
        *,
        device: str | None,
        shown: bool,
        quiet: bool,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Callable[[Any], Quality]:
        """Measures models against ``base``; its outputs are computed here, unless they are cached."""
        import torch
        from tqdm import tqdm

        from hf_quant.evaluation.yardstick import Base, yardstick

        if tokenizer is None:
            raise HfQuantError(f"{base} has no tokenizer, so nothing can be measured: --no-eval leaves it out")
        return yardstick(
            Base(base, revision, getattr(torch, self.base_dtype), device, trust_remote_code), tokenizer, text,
            context=self.context, stride=self.stride, max_tokens=self.max_tokens, say=lambda line: say(line, quiet),
            progress=lambda parts: tqdm(parts, desc="measuring", disable=not shown),
        )  # fmt: skip


def check_overlap(folder: str, text: str) -> None:
    """Refuse ``text`` if the recipe in ``folder`` says that its model was calibrated on it."""
    from hf_quant.data.text import refuse_overlap

    recipe = Path(folder) / "recipe.json"
    if recipe.is_file():
        refuse_overlap(text, (json.loads(recipe.read_text()).get("calibration") or {}).get("paragraphs", []))


def quality_table(quality: dict[str, Any]) -> str:
    """A line for each measure: value, interval, noise."""
    from hf_quant.evaluation.results import interval_shown, why_no_interval

    rows: list[tuple[str, ...]] = []
    for name, e in quality["metrics"].items():
        noise = "-" if e["noise"] is None else f"{e['noise']:.5g}" + (" (within)" if e["within_noise"] else "")
        rows.append((name, f"{e['value']:.5g}", interval_shown(e, "{:.5g}".format, " .. "), noise))
    rows += [(name, f"{value:.5g}", "-", "-") for name, value in quality["quantiles"].items()]
    reason = why_no_interval(quality)
    return table(("measure", "value", "95 % interval", "base in bf16"), rows) + (f"\n{reason}" if reason else "")


def measured_on(quality: dict[str, Any], name: str) -> str:
    """The line below a table of models: on how much of the text called ``name`` they were measured."""
    from hf_quant.evaluation.results import why_no_interval

    reason = why_no_interval(quality)
    return f"measured on {quality['tokens']:,} held-out tokens of {name}" + (f"; {reason}" if reason else "")


def gate_lines(gate: dict[str, Any], layers: Sequence[dict[str, Any]]) -> list[str]:
    """What missed the gate, and where to look."""
    made = [f"gate missed: {miss}" for miss in gate["misses"]]
    if made and layers:
        first = ", ".join(f"{each['layer']} ({each['error']:.1%})" for each in layers[:3])
        outputs = layers[0].get("of") == "outputs"
        made.append(
            f"layers whose outputs lose most: {first}"
            if outputs
            else f"layers farthest from the base's weights: {first}"
        )
    return made


def budget(max_kl: float | None, max_ppl_increase: float | None, min_top1: float | None) -> Budget:
    """The `gate_options` as one value."""
    from hf_quant.evaluation.gate import Budget

    return Budget(max_kl, max_ppl_increase, min_top1)


def schemes(scheme: Sequence[str], bits: int | None, group_size: int | None, asym: bool) -> Sequence[str]:
    """Slugs of the schemes asked for; no torch is needed to refuse them."""
    from hf_quant.core.scheme import QuantScheme

    if not scheme:
        return (str(QuantScheme(4 if bits is None else bits, 128 if group_size is None else group_size, not asym)),)
    given = {"--bits": bits is not None, "--group-size": group_size is not None, "--asym": asym}
    if also := [option for option, there in given.items() if there]:
        raise click.UsageError(f"--scheme {scheme[0]} says all that {also[0]} would: give one of them")
    if len(set(scheme)) < len(scheme):
        raise click.UsageError("--scheme: one of them is given twice")
    return scheme


def configs(
    slugs: Sequence[str], method: str, fmt: str, ignore: Sequence[str], override: Sequence[tuple[str, str | None]],
    lm_head: bool, embeddings: bool,
) -> list[HfQuantConfig]:  # fmt: skip
    """One configuration for every scheme asked for."""
    from hf_quant.hf import HfQuantConfig

    return [
        HfQuantConfig(
            slug,
            method=method,
            format=fmt,
            overrides=dict(override),
            modules_to_not_convert=list(ignore),
            quantize_lm_head=lm_head,
            quantize_embeddings=embeddings,
        )
        for slug in slugs
    ]


def store_results(folder: Path, record: dict[str, Any], tell: Callable[[str], None] = lambda _: None) -> None:
    """Add what was measured to results.json, if ``folder`` is one; what was measured on other weights goes.

    Others may add to it at the same time. A quality measured on less text than the one stored does not replace it.

    Args:
        folder: Of the model.
        record: Fields of results.json.
        tell: Told if something is not stored.
    """
    from filelock import FileLock

    from hf_quant.disk.atomic import make_folder, write_json
    from hf_quant.disk.digests import weight_files

    if not folder.is_dir():
        return
    path, files, lock = folder / "results.json", weight_files(folder), _lock_of(folder)
    make_folder(lock.parent)
    with FileLock(lock, timeout=LOCKED):
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"files": files}
        if not isinstance(known, dict) or "files" not in known:
            tell(f"{path}: was not written by hf-quant, so it is left as it is, and nothing is stored")
            return
        if known["files"] != files:
            known = {}
        write_json(path, known | _better_founded(known, record, tell) | {"files": files})


def _lock_of(folder: Path) -> Path:
    """Not in the folder itself, which may be published."""
    from huggingface_hub.constants import HF_HOME

    name = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(HF_HOME) / "hf_quant" / "locks" / f"{name}.lock"


def _better_founded(known: dict[str, Any], record: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """``record`` with the quality that is stored already, if that has intervals where this has none, or more tokens."""
    from hf_quant.evaluation.gate import Budget
    from hf_quant.evaluation.results import Quality

    old, new = known.get("quality"), record.get("quality")
    if old is None or new is None or old["kind"] != new["kind"]:
        return record
    if (old["resampled"] == "documents", old["tokens"]) <= (new["resampled"] == "documents", new["tokens"]):
        return record
    kept = record | {"quality": old}
    if "gate" in record:
        kept["gate"] = Budget(**record["gate"]["budget"]).verdict(Quality.from_dict(old))
    tell(
        f"results.json keeps the quality measured on {old['tokens']:,} tokens of {old['documents']} documents, which says "
        f"more than these {new['tokens']:,} of {new['documents']}"
        + (", and judges that by the gate" if "gate" in record else "")
    )
    return kept


def say(message: str, quiet: bool = False) -> None:
    """To stderr, unless quiet; each line is short and printable."""
    if not quiet:
        click.echo("\n".join(map(printable, message.split("\n"))), err=True)


def emit(as_json: bool, quiet: bool, *, record: dict[str, Any], essential: str, human: str) -> None:
    """The result, in the one form that was asked for. Only what a script reads from a pipe, ``essential``, stays as it is."""
    if as_json:
        click.echo(json.dumps(record))
    elif quiet and not sys.stdout.isatty():
        click.echo(essential)
    else:
        text = essential if quiet else human
        click.echo(printable(text, sys.maxsize))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, numbers to the right; a cell is one printable line."""
    lines = [[printable(cell, lines=False) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def bars(quiet: bool) -> bool:
    """Whether to show progress bars; switches those of transformers and of the client off with ours."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    shown = not quiet and sys.stderr.isatty() and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") != "1"
    if not shown:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        disable_progress_bars()
    return shown


def find_text(text: str | None, *folders: str) -> Path | None:
    """The file asked for, else the held-out text in one of the folders."""
    if text is not None:
        if not Path(text).is_file():
            raise HfQuantError(f"{text}: no such file")
        return Path(text)
    return next((path for folder in folders if (path := Path(folder) / TEXT).is_file()), None)


def find_calibration(text: str | None, model: str) -> str | None:
    """The calibration text asked for, else the one beside the model, else None for the bundled one.

    Raises:
        HfQuantError: What is asked for looks like a file, and there is none.
    """
    if text is None:
        beside = Path(model) / CALIBRATION
        return str(beside) if beside.is_file() else None
    if Path(text).is_dir() or (Path(text).suffix in (".txt", ".jsonl", ".json", ".md") and not Path(text).is_file()):
        raise HfQuantError(f"--calibration {text}: no such file")
    return text
