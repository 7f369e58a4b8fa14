"""A quantized checkpoint in another format: the same codes, shard by shard, read back and compared.

Nothing is rounded again. What the other format cannot hold exactly is refused before anything is written.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant.checkpoint.contents import Contents, quantization_of
from hf_quant.checkpoint.folder import WEIGHTS, Checkpoint
from hf_quant.core.geometry import PLAIN, Geometry
from hf_quant.core.layout import part_name
from hf_quant.core.numerics import same_bits
from hf_quant.core.tensor import QuantizedTensor, in_order
from hf_quant.disk.atomic import copy_file, write_json
from hf_quant.disk.safetensors import write_tensors
from hf_quant.errors import CheckpointError, FormatError, HfQuantError, OptionError, suggestion
from hf_quant.formats import Format, Layer, conversion_targets, formats, label_of
from hf_quant.hf.candidates import Kind, candidates
from hf_quant.hf.community import homes, place
from hf_quant.hf.config import VERSION
from hf_quant.hf.loading import skeleton
from hf_quant.hf.plan import tied_to_others
from hf_quant.hf.preflight import check_whole
from hf_quant.hf.shards import write_index
from hf_quant.jobs.companions import PATTERNS, copy_companions, inside
from hf_quant.jobs.engines import ENGINES, Verdict
from hf_quant.jobs.from_gguf import is_gguf, read_gguf
from hf_quant.jobs.headers import downloaded
from hf_quant.jobs.options import check_model
from hf_quant.jobs.outputs import CONVERSION, RECIPE, check_output, claimed, record
from hf_quant.jobs.outputs import output as output_folder
from hf_quant.jobs.progress import Bar, Reporter, Say, reporting
from hf_quant.jobs.results import Result, Row, fields
from hf_quant.jobs.targets import GGUF, check_target, why_unheld
from hf_quant.jobs.to_gguf import why_not_gguf, write_gguf
from hf_quant.solve.block import parameter_in

DENSE = "dense"  # floating point
KINDS = {"embedding": "a table of embeddings", "conv1d": "a transposed linear layer (Conv1D)"}


@dataclass(frozen=True, repr=False)
class ConvertResult(Result):
    """What `convert` wrote.

    Attributes:
        source: Format it came in.
        to: Kind of what was written.
        folder: Where it is.
        layers: Number of quantized layers; each was read back and compared.
        bytes_before: Of all weight files.
        bytes_after: The same, afterwards.
        target: The engine that was asked for; None if none was.
        tp: GPUs that it splits each layer over.
        verdict: What that engine will do with it.
    """

    source: str
    to: str
    folder: Path
    layers: int
    bytes_before: int
    bytes_after: int
    target: str | None = None
    tp: int = 1
    verdict: Verdict | None = None

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "from": self.source, "to": self.to, "folder": str(self.folder), "layers": self.layers,
            "bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "identical": True,
        }  # fmt: skip
        if self.verdict is not None:
            record |= {"target": self.target, "tp": self.tp, "kernels": self.verdict.kernels}
        return record

    def title(self) -> str:
        return (
            f"{self.source} converted to {self.to}, in {self.folder}: {self.bytes_before / 1e6:.1f} MB became "
            f"{self.bytes_after / 1e6:.1f} MB"
        )

    def rows(self) -> Iterator[Row]:
        return fields({name: value for name, value in self.to_dict().items() if name != "identical"})

    def footnotes(self) -> list[str]:
        return [f"{self.target}: {line}" for line in self.verdict.lines()] if self.verdict is not None else []


@dataclass(frozen=True)
class _Source:
    folder: Path
    name: str  # of the model, for people
    fmt: str | None = None  # label of what it was, where the folder is a draft


@dataclass(frozen=True)
class _Job:
    contents: Contents
    to: str
    fmt: Format | None  # None: floating point
    dtype: torch.dtype  # of that
    geometries: Mapping[str, Geometry]  # of layers, for floating point
    config: dict[str, Any] | None


def targets() -> list[str]:
    """What a checkpoint can be converted to."""
    return [*conversion_targets(), GGUF, DENSE]


def open_quantized(folder: Path, *, thorough: bool = True) -> Contents:
    """The contents of a local checkpoint that is quantized.

    Raises:
        HfQuantError: It is damaged, or not quantized, or in a way that is not read here.
    """
    checkpoint = Checkpoint.open(folder)
    stored = quantization_of(folder, checkpoint.config)
    if stored is None:
        raise HfQuantError(f"{folder}: config.json has no quantization_config, so nothing is quantized here")
    return Contents.of(checkpoint, stored, thorough=thorough)


def convert(
    model: str | os.PathLike[str], output: str | os.PathLike[str], *, to: str, target: str | None = None, tp: int = 1,
    revision: str | None = None, overwrite: bool = False, progress: bool | Bar = False, say: Say | None = None,
) -> ConvertResult:  # fmt: skip
    """Write a quantized checkpoint in another format, with the same codes; ``hf-quant convert``.

    Every layer is read back from disk and compared before the result appears.

    Args:
        model: A quantized checkpoint, in any format that is read here; a Hub id is downloaded; or a GGUF file.
        output: Folder of the result; it becomes a complete checkpoint, or is not there.
        to: Label of a format (`formats.conversion_targets`), ``"gguf"`` for one file of llama.cpp, or ``"dense"`` for floating point in
            the dtype of config.json.
        target: An engine (`engines.ENGINES`) that must be able to run the result.
        tp: GPUs that it splits each layer over.
        revision: Of a Hub model.
        overwrite: Whether ``output`` may exist, if hf-quant wrote it.
        progress: As for `quantize`.
        say: As for `quantize`.

    Raises:
        OptionError: There is no such kind or engine; or ``tp`` is given without a ``target``, or ``revision`` for what is on disk.
        HfQuantError: ``output`` may not be written (`hf_quant.jobs.outputs.check_output`), or another process is writing it.
        FormatError: The other format cannot hold a layer exactly, or the engine cannot run it.
        CheckpointError: The source is damaged; or what was written does not read back as it was.
    """
    to = to.lower().replace("_", "-")
    if to not in targets():
        raise OptionError(f"--to {to}: there is {', '.join(targets())}{suggestion(to, targets())}")
    check_target(target, tp)
    source, out = Path(model), Path(output)
    if to == GGUF and out.suffix == ".gguf":
        raise OptionError(f"-o {out}: name a folder; the file in it is model.gguf, beside a record of the conversion")
    check_output(out, [source], overwrite=overwrite)
    if revision is not None and source.exists():
        raise OptionError(f"--revision {revision}: {source} is on this disk, and has no revisions as on the Hub")
    with reporting(progress, say) as report:
        if is_gguf(source):
            with tempfile.TemporaryDirectory(prefix=".gguf-", dir=out.resolve().parent) as native:
                name = read_gguf(source, Path(native), report.say)
                done = _convert(_Source(Path(native), name, GGUF), out, to, target, tp, overwrite, report)
            return replace(done, bytes_before=source.stat().st_size)
        name = source.resolve().name if source.is_dir() else source.name
        folder = downloaded(check_model(model), revision, [*PATTERNS, "*.safetensors"])
        return _convert(_Source(folder, name), out, to, target, tp, overwrite, report)


def _convert(
    source: _Source, out: Path, to: str, target: str | None, tp: int, overwrite: bool, report: Reporter
) -> ConvertResult:
    contents = open_quantized(source.folder)
    verdict = ENGINES[target](conversion_targets().get(to, to), contents.layers, tp) if target else None
    if verdict is not None and verdict.refused:
        raise FormatError(f"{target}: " + "; ".join(verdict.lines()[len(verdict.kernels) :]))
    refuse(contents, to)
    model, before = skeleton(str(source.folder)), source.fmt or label_of(contents.format)
    check_whole(model, contents)
    with claimed(out), output_folder(out, [source.folder], overwrite=overwrite) as stage:
        if to == GGUF:
            write_gguf(contents, source.name, stage, report)
        else:
            _safetensors(_job(model, contents, to), stage, report)
        write_json(stage / CONVERSION, {"from": before, "to": to} | record(stage))
        size = sum(file.stat().st_size for kind in ("*.safetensors", "*.gguf") for file in stage.glob(kind))
    weights = sum(file.stat().st_size for file in _files(contents))
    return ConvertResult(before, to, out, len(contents.layers), weights, size, target, tp, verdict)


def _files(contents: Contents) -> list[Path]:
    return sorted({info.file for info in contents.checkpoint.tensors.values()})


def _safetensors(job: _Job, stage: Path, report: Reporter) -> None:
    where: dict[str, str] = {}
    for file in report.bar(_files(job.contents), "files"):
        where |= dict.fromkeys(_write(job, file, stage), file.name)
    _rest(job, stage, where, report.say)
    _compare(job, stage)


def why_not(contents: Contents, to: str) -> dict[str, list[str]]:
    """Why a format cannot hold a checkpoint exactly: sentence to layers, to none if it concerns all of it; empty if it can."""
    reasons: dict[str, list[str]] = {}
    if to == GGUF:
        return why_not_gguf(contents)
    if to != DENSE:
        fmt = _writer(contents, to)
        kinds = {} if fmt.in_memory else kinds_of(contents)
        for name, layer in contents.layers.items():
            if (reason := _refusal(fmt, layer, kinds.get(name, "linear"))) is not None:
                reasons.setdefault(reason, []).append(name)
    return reasons


def kinds_of(contents: Contents) -> dict[str, Kind]:
    """What the layers of a checkpoint are in their model; of experts that lie one by one, their stack."""
    model = skeleton(str(contents.checkpoint.folder))
    targets = candidates(model)
    return {name: targets[home].kind for name, home in homes(model, contents).items() if home in targets}


def _refusal(fmt: Format, layer: Layer, kind: str) -> str | None:
    if layer.scheme is None:
        return f"not integer codes ({layer.note}); --to dense makes it floating point"
    if len(layer.shape) != 2 and not fmt.in_memory:
        return "its experts are stacked, and this format holds matrices"
    if layer.convolution and not fmt.in_memory:
        return "a convolution, and this format holds linear layers; --to dense makes it floating point"
    if kind in KINDS and kind not in fmt.kinds and not fmt.in_memory:
        return f"{KINDS[kind]}, and programs that read {fmt.label} expect plain linear layers; --to dense makes it floating point"
    return why_unheld(fmt, layer, layer.scheme)


def _writer(contents: Contents, to: str) -> Format:
    schemes = [layer.scheme for layer in contents.layers.values() if layer.scheme is not None]
    return formats()[conversion_targets()[to]].writer(schemes)


def refuse(contents: Contents, to: str) -> None:
    """Refuse a format that cannot hold the layers of a checkpoint exactly; says why."""
    if reasons := why_not(contents, to):
        reason, names = next(iter(reasons.items()))
        others = sum(map(len, reasons.values())) - 1
        layers = f"{names[0]}{f' and {others} more layers' if others else ''}: " if names else ""
        raise FormatError(f"--to {to}: {layers}{reason}")


def _job(model: Any, contents: Contents, to: str) -> _Job:
    schemes = {name: layer.scheme for name, layer in contents.layers.items() if layer.scheme is not None}
    left = [n.removesuffix(".weight") for n in contents.rest if _is_linear(n, contents.checkpoint)]
    fmt = None if to == DENSE else _writer(contents, to)
    targets, places = candidates(model), homes(model, contents)  # layers have the names that the model has for them
    if fmt is None:
        geometries = {name: parameter_in(model, home)[1] for name, home in places.items() if home in targets}
        return _Job(contents, to, None, _dtype(contents), geometries, None)
    if fmt.in_memory:
        if dense := place(model, contents).dense:
            raise FormatError(f"--to {to}: {next(iter(dense))}: {next(iter(dense.values()))}")
        schemes = {places[name]: scheme for name, scheme in schemes.items()}
        left = [name for name in targets if name not in schemes]
        config = fmt.config(schemes, sorted(left))
        if convolutions := [name for name in schemes if targets[name].kind == "patches"]:
            config["convolutions"] = convolutions
        if any(targets[name].kind == "embedding" for name in schemes):  # some hosts look for this field alone
            config["quantize_embeddings"] = True
        return _Job(contents, to, fmt, torch.float32, {}, config)
    left += [name for name in tied_to_others(model) if name in targets and targets[name].kind == "linear"]
    config = fmt.config(schemes, sorted(set(left) - set(schemes))) | {"hf_quant": _known(contents)}
    return _Job(contents, to, fmt, torch.float32, {}, config)


def _known(contents: Contents) -> dict[str, Any]:
    """The entry by which a checkpoint in another format is known as ours, so that it runs here wherever it is loaded."""
    stored = quantization_of(contents.checkpoint.folder, contents.checkpoint.config) or {}
    ours = stored if stored.get("quant_method") == "hf_quant" else stored.get("hf_quant")
    fields = ours if isinstance(ours, Mapping) else {}
    return {"version": VERSION} | {name: fields[name] for name in ("method", "share_quantized") if name in fields}


def _is_linear(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor looks like the weight of a linear layer: tables of embeddings have other names."""
    return name.endswith(".weight") and len(checkpoint.tensors[name].shape) == 2 and "embed" not in name


def _dtype(contents: Contents) -> torch.dtype:
    config = contents.checkpoint.config
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    return next(iter(contents.layers.values())).scale_dtype


def _write(job: _Job, file: Path, stage: Path) -> list[str]:
    """Write one shard; the names of what is in it. A layer goes where its first tensor was."""
    source = job.contents.checkpoint
    owner = {full: module for module, tensors in job.contents.names.items() for full in tensors.values()}
    first = {module: next(iter(tensors.values())) for module, tensors in job.contents.names.items()}
    shard: dict[str, Tensor] = {}
    for name in (name for name, info in source.tensors.items() if info.file == file):
        if name not in owner:
            shard[name] = source.read(name)
        elif first[owner[name]] == name:
            shard |= _layer(job, owner[name])
    write_tensors(stage / file.name, shard)
    return list(shard)


def _layer(job: _Job, module: str) -> dict[str, Tensor]:
    """The tensors of one layer, in the other format."""
    read, stack = job.contents.read(module), len(job.contents.layers[module].shape) == 3
    stem = module if stack else f"{module}.weight"
    if job.fmt is None:
        return {stem: _float(job, module, read)}
    assert isinstance(read, QuantizedTensor)
    if job.fmt.scales_16bit and read.scale.dtype is torch.float32:
        read = _narrowed(module, read, job.to)
    written = job.fmt.write(read)
    return {part_name(module, local) if stack else f"{module}.{local}": tensor for local, tensor in written.items()}


def _float(job: _Job, module: str, read: QuantizedTensor | Tensor) -> Tensor:
    dense = read.dequantize(job.dtype) if isinstance(read, QuantizedTensor) else read.to(job.dtype)
    return job.geometries.get(module, PLAIN).weight(dense)


def _narrowed(module: str, read: QuantizedTensor, to: str) -> QuantizedTensor:
    for dtype in (torch.float16, torch.bfloat16):
        narrow = read.scale.to(dtype)
        if torch.equal(narrow.float(), read.scale):
            return replace(read, scale=narrow)
    raise FormatError(f"--to {to}: {module}: its scales need float32, and readers of this format keep 16 bits")


def _rest(job: _Job, stage: Path, where: dict[str, str], say: Callable[[str], None]) -> None:
    """The index, the configuration, and small files like those of the tokenizer."""
    source = job.contents.checkpoint
    if set(where.values()) != {WEIGHTS}:
        write_index(stage, sorted(set(where.values())))
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    config.pop("quantization_config", None)
    config.pop("transformers_weights", None)
    config.pop("quantization", None)  # of MLX
    fields = ["quantization_config", *(job.fmt.also_in if job.fmt else ())]
    write_json(stage / "config.json", config | (dict.fromkeys(fields, job.config) if job.config else {}))
    recipe = source.folder / RECIPE
    if recipe.is_file() and inside(recipe, source.folder):
        copy_file(recipe, stage / RECIPE)
    copy_companions(source.folder, stage, say, notices=True, code=True)


def _compare(job: _Job, stage: Path) -> None:
    """Open what was written as anybody would, and compare every tensor."""
    source, written = job.contents, Checkpoint.open(stage)
    new = Contents.of(written, job.config) if job.config else None
    for name in source.rest:
        _same(name, source.checkpoint.read(name), written.read(name))
    for module in source.layers:
        before = source.read(module)
        if new is None:
            stem = module if len(source.layers[module].shape) == 3 else f"{module}.weight"
            _same(module, _float(job, module, before), written.read(stem))
            continue
        after = new.read(module)
        assert isinstance(before, QuantizedTensor)
        assert isinstance(after, QuantizedTensor)
        _same(module, before.dequantize(torch.float32), after.dequantize(torch.float32))
        _same(module, _codes(before), _codes(after))
        if before.scheme.activations != after.scheme.activations:
            raise CheckpointError(
                f"{module}: activations of {before.scheme} became those of {after.scheme}; nothing is kept"
            )
        if before.input_scale is not None and after.input_scale is not None:
            _same(f"{module}: scale of the inputs", before.input_scale, after.input_scale)


def _codes(tensor: QuantizedTensor) -> Tensor:
    return tensor.codes() if tensor.perm is None else in_order(tensor.codes(), tensor.perm)


def _same(name: str, before: Tensor, after: Tensor) -> None:
    if not same_bits(before, after):
        raise CheckpointError(f"{name}: what was written does not read back as it was; nothing is kept")
