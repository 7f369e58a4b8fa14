"""``hf-quant plan``: what quantizing would give, from config and headers alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._common import (
    configs,
    emit,
    hub,
    model_options,
    output_options,
    scheme_options,
    schemes,
    table,
)
from hf_quant.cli._types import Model

if TYPE_CHECKING:
    from hf_quant.hf.plan import Plan

WORKING = 60e6  # bytes of working memory while quantizing on load; benchmarks/rtn_memory.py measures it
SMALL = 1_000_000_000
ENOUGH = 0.2  # of weights and KV cache together: less saved than this is hardly felt
KV_BITS = {
    "int8": 8.25,
    "int4": 5,
}  # of each value, scales included, in heads of 64; the newest tokens of INT4 left out
LITTLE = 0.05  # of the memory there is


@click.command()
@click.argument("model", type=Model())
@scheme_options
@model_options
@output_options
def command(
    model: str, revision: str | None, trust_remote_code: bool, as_json: bool, quiet: bool,
    scheme: tuple[str, ...], bits: int | None, group_size: int | None, asym: bool, **options: Any,
) -> None:  # fmt: skip
    """Say what quantizing MODEL would give, without reading its weights."""
    slugs = schemes(scheme, bits, group_size, asym)

    from hf_quant.hf import plan_of

    if Path(model).is_dir():
        from hf_quant.checkpoint.folder import Checkpoint

        Checkpoint.open(Path(model))
    records: list[dict[str, Any]] = []
    summaries = []
    for config in configs(slugs, **options):
        skeleton, plan = plan_of(model, config, **hub(revision, trust_remote_code))
        cache = _cache_bytes(skeleton.config.get_text_config())
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
                "left": plan.left | plan.others,
                "kv_cache_bytes": cache,
                "kv_cache_bytes_int8": int(cache * KV_BITS["int8"] / 16),
                "kv_cache_bytes_int4": int(cache * KV_BITS["int4"] / 16),
                "advice": [*_advice(plan.params, config.bits), *_worth(plan, cache)],
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


def _cache_bytes(config: Any) -> int:
    """Keys and values of one sequence as long as the model allows, in 16 bits; 0 where that is unknown or not used."""
    tokens, layers = getattr(config, "max_position_embeddings", None), getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if not (tokens and layers and heads and getattr(config, "use_cache", False)):
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * layers * heads * width * tokens)


def _worth(plan: Plan, cache: int) -> list[str]:
    """Whether what is saved matters, beside the KV cache and on this machine."""
    made, saved = [], plan.bytes_float - plan.bytes_quantized
    if cache and saved < ENOUGH * (plan.bytes_float + cache):
        made.append(
            f"hardly worth it at long context: {cache / 1e6:.0f} MB of keys and values at the full length stay, so "
            f"{saved / 1e6:.0f} MB are {saved / (plan.bytes_float + cache):.0%} of the whole; in INT8 they are "
            f"{cache * KV_BITS['int8'] / 16e6:.0f} MB, in INT4 {cache * KV_BITS['int4'] / 16e6:.0f}: hf_quant.QuantCache"
        )
    memory = _memory()
    if memory and plan.bytes_float < LITTLE * memory:
        made.append(
            f"hardly worth it for memory on this machine: unquantized it takes {plan.bytes_float / memory:.1%} of "
            f"{memory / 1e9:.0f} GB"
        )
    return made


def _memory() -> int:
    """Bytes of the first GPU, else of the machine; 0 where that is unknown."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


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
