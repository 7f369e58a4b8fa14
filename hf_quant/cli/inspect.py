"""``hf-quant inspect``: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from hf_quant.cli._common import emit, output_options, table
from hf_quant.errors import CheckpointError

CODES = (".weight_packed", ".qweight", ".weight_scale", ".scales", ".weight.absmax", ".SCB", ".weight.quant_state")


@click.command()
@click.argument("model")
@output_options
def command(model: str, as_json: bool, quiet: bool) -> None:
    """Say how the checkpoint in the folder MODEL is quantized."""
    if not Path(model).is_dir():
        raise CheckpointError(f"{model}: no such folder; inspect reads local checkpoints")
    from hf_quant.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(Path(model))
    stored = checkpoint.config.get("quantization_config") or {}
    layers = {name[: -len(end)] for name in checkpoint.tensors for end in CODES if name.endswith(end)}
    layers |= {n[: -len("_scale")] for n in checkpoint.tensors if n.endswith("_proj_scale")}  # stacked experts
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.dtype] += info.nbytes
    matrices = [n for n, info in checkpoint.tensors.items() if n.endswith(".weight") and len(info.shape) == 2]
    record: dict[str, Any] = {
        "format": _format(stored),
        "bits": stored.get("bits") or _first_group(stored).get("num_bits"),
        "group_size": stored.get("group_size") or _first_group(stored).get("group_size"),
        "layers_quantized": len(layers),
        "matrices_in_floating_point": sum(n.removesuffix(".weight") not in layers for n in matrices),
        "share_quantized": (stored.get("hf_quant") or stored).get("share_quantized"),
        "files": len({info.file for info in checkpoint.tensors.values()}),
        "bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sizes.most_common()),
    }
    human = table(("field", "value"), [(name, str(value)) for name, value in record.items()])
    emit(as_json, quiet, record=record, essential=record["format"], human=human)


def _format(stored: dict[str, Any]) -> str:
    if not stored:
        return "not quantized"
    method = str(stored.get("quant_method", "unknown"))
    return (
        f"hf_quant {stored.get('format')}" if method == "hf_quant" else f"{method} {stored.get('format', '')}".strip()
    )


def _first_group(stored: dict[str, Any]) -> dict[str, Any]:
    groups = list((stored.get("config_groups") or {}).values())
    plain = [g for g in groups if "Linear" in (g.get("targets") or [])] or groups
    return (plain[0].get("weights") or {}) if plain else {}


COMMAND = command
