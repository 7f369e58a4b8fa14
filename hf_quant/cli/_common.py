"""Options and output that commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.errors import HfQuantError

if TYPE_CHECKING:
    from hf_quant.evaluation.gate import Budget
    from hf_quant.hf import HfQuantConfig
    from hf_quant.results import Quality

Function = Callable[..., Any]
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}
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
        click.option("--override", multiple=True, metavar="GLOB=SCHEME", help="Another scheme for some layers."),
        click.option("--ignore", multiple=True, metavar="GLOB", help="Layers to leave in floating point."),
        click.option("--format", "fmt", default="auto", help="auto, native or compressed_tensors."),
        click.option("--method", default="rtn", help="How codes are chosen."),
        click.option("--asym", is_flag=True, help="With zero points."),
        click.option("--group-size", type=int, default=128, help="Columns that share a scale; -1: a whole row."),
        click.option("--bits", type=int, default=4, help="8, 4, 3 or 2."),
        click.option("--scheme", multiple=True, metavar="SLUG", help="For example W4A16-g128; in place of the above."),
    ):
        function = option(function)
    return function


def size(value: str) -> int:
    """``4GB`` as bytes."""
    number = value.rstrip("BKMGbkmg")
    return int(float(number) * UNITS[value[len(number) :].upper()])


def share(value: str) -> float:
    """A share of one: ``0.01`` or ``1%``."""
    return float(value[:-1]) / 100 if value.endswith("%") else float(value)


def gate_options(function: Function) -> Function:
    """What quantization may cost; a miss exits with 3."""
    for option in (
        click.option("--min-top1", type=share, help="Gate: top-1 agreement with the base, such as 95%."),
        click.option("--max-ppl-increase", type=share, help="Gate: perplexity over the base's, such as 1%."),
        click.option("--max-kl", type=float, help="Gate: KL divergence to the base, nats per token, such as 0.02."),
    ):
        function = option(function)
    return function


def measure_options(function: Function) -> Function:
    """What to measure on, and how."""
    for option in (
        click.option("--allow-overlap", is_flag=True, help="Measure even on text that was calibrated on."),
        click.option("--base-dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
                     show_default=True, help="What the base computes in while it is the yardstick."),
        click.option("--max-tokens", type=int, help="Measure about that many at most."),
        click.option("--stride", type=int, help="Tokens from one window to the next; default: the context."),
        click.option("--context", type=int, help="Tokens in a window; default: 512, or what the model allows."),
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

    def beside(self, *folders: str) -> tuple[str, str] | None:
        """Name and content of the text to measure on: the one named, or the one in ``folders``; None if there is none."""
        from hf_quant.text import read_dataset, read_text

        if self.dataset is not None:
            return self.dataset, read_dataset(self.dataset)
        file = find_text(self.text, *folders)
        return None if file is None else (file.name, read_text(file))

    def find(self, *folders: str) -> tuple[str, str]:
        """The same, or else the bundled text."""
        from hf_quant.text import BUNDLED, read_text

        return self.beside(*folders) or ("the bundled text (documentation of Python)", read_text(BUNDLED))

    def yardstick(
        self,
        base: str,
        text: str,
        tokenizer: Any,
        *,
        revision: str | None,
        device: str | None,
        shown: bool,
        quiet: bool,
    ) -> Callable[[Any], Quality]:
        """Measures models against ``base``; its outputs are computed here, unless they are cached."""
        import torch
        from tqdm import tqdm

        from hf_quant.evaluation.yardstick import Base, yardstick

        if tokenizer is None:
            raise HfQuantError(f"{base} has no tokenizer, so nothing can be measured: --no-eval leaves it out")
        return yardstick(
            Base(base, revision, getattr(torch, self.base_dtype), device), tokenizer, text,
            context=self.context, stride=self.stride, max_tokens=self.max_tokens, say=lambda line: say(line, quiet),
            progress=lambda parts: tqdm(parts, desc="measuring", disable=not shown),
        )  # fmt: skip


def check_overlap(folder: str, text: str) -> None:
    """Refuse ``text`` if the recipe in ``folder`` says that its model was calibrated on it."""
    from hf_quant.text import refuse_overlap

    recipe = Path(folder) / "recipe.json"
    if recipe.is_file():
        refuse_overlap(text, (json.loads(recipe.read_text()).get("calibration") or {}).get("paragraphs", []))


def quality_lines(quality: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each measure: value, interval, noise."""
    rows: list[tuple[str, ...]] = []
    for name, e in quality["metrics"].items():
        noise = "-" if e["noise"] is None else f"{e['noise']:.5g}" + (" (within)" if e["within_noise"] else "")
        rows.append((name, f"{e['value']:.5g}", f"{e['low']:.5g} .. {e['high']:.5g}", noise))
    rows += [(name, f"{value:.5g}", "-", "-") for name, value in quality["quantiles"].items()]
    return rows


QUALITY_HEAD = ("measure", "value", "95 % interval", "base in bf16")


def gate_lines(gate: dict[str, Any], layers: Sequence[dict[str, Any]]) -> list[str]:
    """What missed the gate, and where to look."""
    made = [f"gate missed: {miss}" for miss in gate["misses"]]
    if made and layers:
        first = ", ".join(f"{each['layer']} ({each['error']:.1%})" for each in layers[:3])
        made.append(f"layers farthest from the base's weights: {first}")
    return made


def budget(max_kl: float | None, max_ppl_increase: float | None, min_top1: float | None) -> Budget:
    """The `gate_options` as one value."""
    from hf_quant.evaluation.gate import Budget

    return Budget(max_kl, max_ppl_increase, min_top1)


def configs(
    scheme: Sequence[str], bits: int, group_size: int, asym: bool, method: str, fmt: str,
    ignore: Sequence[str], override: Sequence[str], lm_head: bool, embeddings: bool,
) -> list[HfQuantConfig]:  # fmt: skip
    """One configuration for every scheme asked for."""
    from hf_quant.hf import HfQuantConfig
    from hf_quant.scheme import QuantScheme

    overrides: dict[str, str | None] = {}
    for item in override:
        glob, equals, slug = item.partition("=")
        if not equals:
            raise click.BadParameter(f"{item!r} is not GLOB=SCHEME", param_hint="--override")
        overrides[glob] = None if slug == "float" else slug
    return [
        HfQuantConfig(
            slug,
            method=method,
            format=fmt,
            overrides=overrides,
            modules_to_not_convert=list(ignore),
            quantize_lm_head=lm_head,
            quantize_embeddings=embeddings,
        )
        for slug in scheme or (str(QuantScheme(bits, group_size, not asym)),)
    ]


def store_results(folder: Path, record: dict[str, Any]) -> None:
    """Add what was measured to results.json, if ``folder`` is one; what was measured on other weights goes."""
    from hf_quant.digests import weight_files
    from hf_quant.disk import write_json

    if folder.is_dir():
        path, files = folder / "results.json", weight_files(folder)
        known = json.loads(path.read_text()) if path.is_file() else {}
        if known.get("files", files) != files:
            known = {}
        write_json(path, known | record | {"files": files})


def say(message: str, quiet: bool = False) -> None:
    """To stderr, unless quiet."""
    if not quiet:
        click.echo(message, err=True)


def emit(as_json: bool, quiet: bool, *, record: dict[str, Any], essential: str, human: str) -> None:
    """The result, in the one form that was asked for."""
    click.echo(json.dumps(record) if as_json else essential if quiet else human)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, numbers to the right."""
    lines = [list(head), *map(list, rows)]
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
