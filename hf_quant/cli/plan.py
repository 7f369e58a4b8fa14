"""``hf-quant plan``: what quantizing would give, from config and headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_quant.cli._common import configs, emit, output_options, scheme_options, table

WORKING = 60e6  # bytes of working memory while quantizing on load; benchmarks/rtn_memory.py measures it
SMALL = 1_000_000_000


@click.command()
@click.argument("model")
@scheme_options
@click.option("--revision", help="Of a Hub model.")
@output_options
def command(model: str, revision: str | None, as_json: bool, quiet: bool, **scheme: Any) -> None:
    """Say what quantizing MODEL would give, without reading its weights."""
    from hf_quant.hf import plan_of

    if Path(model).is_dir():
        from hf_quant.checkpoint import Checkpoint

        Checkpoint.open(Path(model))
    records: list[dict[str, Any]] = []
    summaries = []
    for config in configs(**scheme):
        _, plan = plan_of(model, config, revision)
        summaries.append(f"{config.scheme}: {plan.summary()}")
        records.append(
            {
                "scheme": config.scheme,
                "bytes_before": plan.bytes_float,
                "bytes_after": plan.bytes_quantized,
                "peak_bytes": int(plan.bytes_quantized + WORKING),
                "bits_per_weight": plan.bits_per_weight,
                "share_quantized": plan.share,
                "parameters": plan.params,
                "format": plan.format,
                "format_reason": plan.format_reason,
                "left": plan.left,
                "advice": _advice(plan.params, config.bits),
            }
        )
    rows = [
        (
            r["scheme"], f"{r['bytes_before'] / 1e6:.1f}", f"{r['bytes_after'] / 1e6:.1f}",
            f"{r['peak_bytes'] / 1e6:.0f}", f"{r['bits_per_weight']:.2f}", f"{r['share_quantized']:.1%}",
        )
        for r in records
    ]  # fmt: skip
    head = ("scheme", "MB before", "MB after", "peak MB", "bits/weight", "quantized")
    advice = sorted({line for record in records for line in record["advice"]})
    human = "\n\n".join([table(head, rows), *summaries, *advice])
    emit(as_json, quiet, record={"model": model, "plans": records}, essential=rows[0][2], human=human)


def _advice(params: int, bits: int) -> list[str]:
    """When not to quantize, or not without a measurement."""
    made = []
    if params < SMALL:
        made.append(
            f"{params / 1e6:.0f}M parameters: small models lose more from quantization; measure before you publish"
        )
    if bits == 2:
        made.append("2 bits without evidence usually break a model: measure before you use it")
    return made


COMMAND = command
