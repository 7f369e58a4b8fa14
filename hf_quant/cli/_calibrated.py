"""What commands with calibrated methods share: options, the text to look at, and progress."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._common import Function
from hf_quant.cli._types import Size

if TYPE_CHECKING:
    from hf_quant.data.calibration import Calibration


def calibration_options(function: Function) -> Function:
    """What calibrated methods look at, and what that may take."""
    for option in (
        click.option(
            "--max-memory", type=Size(), help="What activations may take before they go to disk, such as 2GB."
        ),
        click.option(
            "--calibration-tokens", type=click.IntRange(1), default=65536, show_default=True, help="How much of it."
        ),
        click.option(
            "--calibration",
            metavar="TEXT",
            help="For calibrated methods: a UTF-8 or JSONL file, or ID[:CONFIG][@SPLIT][#COLUMN][~REVISION] of a datasets set; "
            "default: calibration.txt beside the model, else a bundled text.",
        ),
    ):
        function = option(function)
    return function


def looks_at_text(method: str, slugs: Sequence[str], calibration: str | None) -> bool:
    """Whether the method needs calibration data for one of the schemes; data that nothing looks at are refused."""
    from hf_quant.core.scheme import QuantScheme
    from hf_quant.solve.recipes import preset

    calibrated = any(preset(method, QuantScheme.parse(slug)).calibrated for slug in slugs)
    if calibration is not None and not calibrated:
        raise click.UsageError(f"--calibration: --method {method} looks at no text")
    return calibrated


def calibration_for(
    model: str, source: str | None, tokens: int, tokenizer: Any, from_hub: dict[str, Any]
) -> Calibration:
    """What calibrated methods look at."""
    from hf_quant.data.calibration import calibration
    from hf_quant.evaluation.yardstick import Base

    base = Base(model, **from_hub)
    return calibration(source, tokenizer, base.context(), tokens, base.vocabulary())


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
