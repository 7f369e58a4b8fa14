"""``hf-quant inspect``: what a checkpoint holds, from config.json and its headers alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from hf_quant.cli._common import emit, output_options, target_options, waiting
from hf_quant.cli._types import Model
from hf_quant.errors import OptionError, printable
from hf_quant.jobs.results import Grid, Row, fields

if TYPE_CHECKING:
    from hf_quant.checkpoint.contents import Contents
    from hf_quant.checkpoint.folder import Checkpoint


@click.command(short_help="How a checkpoint is quantized.")
@click.argument("model", type=Model())
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@target_options
@output_options
def command(
    model: str, revision: str | None, target: str | None, tp: int, as_json: bool, quiet: bool
) -> None:  # fmt: skip
    """Say how MODEL, a folder or a Hub id, is quantized: format, schemes, which layers and which not.

    Of a Hub id only the headers of the weights are fetched.
    """
    from hf_quant.checkpoint.contents import Contents, quantization_of
    from hf_quant.jobs.headers import opened
    from hf_quant.jobs.options import check_model
    from hf_quant.jobs.targets import check_target, served

    check_target(target, tp)
    check_model(model, revision)
    with waiting("reading headers", quiet or as_json), opened(model, revision) as checkpoint:
        stored = quantization_of(checkpoint.folder, checkpoint.config)
        contents = None if stored is None else Contents.of(checkpoint, stored, thorough=False)
    if target is not None and contents is None:
        raise OptionError(
            f"--target: nothing in {model} is quantized; hf-quant plan {model} --target {target} says what would be"
        )
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.dtype] += info.nbytes
    left = _left(checkpoint, contents)
    record: dict[str, Any] = {
        "format": _format(stored, contents),
        **_layers(contents),
        "matrices_in_floating_point": len(left),
        "left": left,
        "share_quantized": _share(stored),
        "files": len({info.file for info in checkpoint.tensors.values()}),
        "bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sizes.most_common()),
    }
    engine = None if target is None or contents is None else served(target, tp, contents.format, contents.layers)
    record |= {} if engine is None else {"served": engine.to_dict()}
    human = [*_lines(record), *(("engine", line) for line in (engine.lines() if engine is not None else ()))]
    emit(as_json, quiet, record=record, essential=record["format"], human=Grid(("field", "value"), human))


def _lines(record: dict[str, Any]) -> list[Row]:
    """What a person reads of it."""
    coded = record["layers_quantized"] > 0
    notable = (
        "format",
        "bits",
        "group_size",
        "codebook",
        "layers_quantized",
        "share_quantized",
        "files",
        "bytes",
        "bytes_by_dtype",
    )
    lines = list(fields({name: record[name] for name in notable if coded or name not in ("layers_quantized",)}))
    if coded:
        zeros = "none: the codes are symmetric" if record["symmetric"] else "one a group"
        lines.insert(3, ("zero points", zeros))
        lines += [(f"{count} layers", scheme) for scheme, count in record["schemes"].items()]
    if record["act_order"]:
        lines.append(("order of columns", "by their activations (desc_act)"))
    lines += [("note", note) for note in record["notes"]]
    left = record["left"]
    return [*lines, (f"{len(left)} matrices in floating point", _shown(left))] if left else lines


def _layers(contents: Contents | None) -> dict[str, Any]:
    """Bits and group size of most layers, and all schemes with the number of their layers."""
    layers = list(contents.layers.values()) if contents is not None else []
    schemes = Counter(str(layer.scheme) if layer.scheme else f"floating point: {layer.note}" for layer in layers)
    coded = [layer.scheme for layer in layers if layer.scheme]
    most = Counter(coded).most_common(1)[0][0] if coded else None
    return {
        "bits": most.bits if most else None,
        "group_size": most.group_size if most else None,
        "symmetric": most.symmetric if most else None,
        "codebook": most.codebook if most else None,
        "act_order": any(scheme.permuted for scheme in coded),
        "layers_quantized": len(layers),
        "schemes": dict(schemes.most_common()),
        "notes": sorted({layer.note for layer in layers if layer.note}),
    }


def _left(checkpoint: Checkpoint, contents: Contents | None) -> list[str]:
    """Matrices in floating point, by name."""
    names = contents.rest if contents is not None else list(checkpoint.tensors)
    matrices = [n for n in names if n.endswith(".weight") and len(checkpoint.tensors[n].shape) == 2]
    return [name.removesuffix(".weight") for name in matrices]


def _share(stored: Any) -> float | None:
    """What the program that quantized the model wrote of it, if it is a number."""
    ours = (stored or {}).get("hf_quant")
    share = (ours if isinstance(ours, dict) else stored or {}).get("share_quantized")
    return share if isinstance(share, float) else None


def _shown(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _format(stored: Any, contents: Contents | None) -> str:
    if not stored or contents is None:
        return "not quantized"
    variant = next((stored[field] for field in contents.fmt.variant_fields if stored.get(field)), "")
    return printable(f"{stored.get('quant_method', 'unknown')} {variant}".strip(), 100)


COMMAND = command
