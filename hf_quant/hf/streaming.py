"""Calibrated quantization of a checkpoint that is never loaded whole: block by block from its shards, resumable."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from hf_quant.checkpoint import INDEX, Checkpoint, read_header, write_tensors
from hf_quant.disk import copy_file, link_file, need_space, write_json
from hf_quant.errors import HfQuantError, PlanError
from hf_quant.formats import Format, format_named
from hf_quant.hf.config import HfQuantConfig
from hf_quant.hf.loading import class_of
from hf_quant.hf.plan import Plan, freeze, make_plan
from hf_quant.journal import Journal, digest, journal
from hf_quant.methods import method
from hf_quant.stream import Block, Call, Solved, advance, solve, use
from hf_quant.tensor import QuantizedTensor

BATCH = 4  # sequences that walk up the model together
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class _Source:
    """A checkpoint, its model without weights, and what shall become of it."""

    checkpoint: Checkpoint
    model: Any
    plan: Plan
    config: HfQuantConfig
    blocks: dict[str, nn.Module]
    dtype: torch.dtype  # the checkpoint's, and that of the scales; blocks are filled in float32

    def owner(self, tensor: str) -> str | None:
        """The block a tensor belongs to; None outside of blocks."""
        return next((name for name in self.blocks if tensor.startswith(f"{name}.")), None)

    def layers(self, block: str) -> dict[str, Any]:
        """The layers of a block that are quantized, in the order of the model."""
        return {name: scheme for name, scheme in self.plan.schemes.items() if name.startswith(f"{block}.")}


def quantize_streaming(
    folder: Path, config: HfQuantConfig, ids: Tensor, work: Path, stage: Path, *,
    say: Callable[[str], None], progress: Progress = iter,
) -> tuple[Plan, list[dict[str, Any]]]:  # fmt: skip
    """Quantize the checkpoint in ``folder`` into ``stage``, going on with whatever ``work`` holds of the same job.

    Args:
        folder: Float checkpoint of a decoder-only model, whose tensors are named as the model's modules are.
        config: The plan, with a calibrated method.
        ids: Calibration tokens, int64 ``[S, T]``.
        work: Finished blocks and their journal; the caller removes it when all is done.
        stage: An empty folder; becomes a complete checkpoint.
        say: Told what is worth knowing.
        progress: Wraps the list of blocks.

    Returns:
        The plan, and a record of each block: errors, notes.

    Raises:
        HfQuantError: Something in the model, the checkpoint or the work folder is not as it must be.
    """
    source = _open(folder, config)
    job = {
        "source": {file.name: digest(file) for file in sorted({t.file for t in source.checkpoint.tensors.values()})},
        "config": config.to_dict(), "calibration": digest_of(ids), "torch": torch.__version__,
        "transformers": version("transformers"), "hf-quant": version("hf-quant"),
    }  # fmt: skip
    with journal(work, job, say) as done, torch.inference_mode():
        finished = sum((work / part["file"]).stat().st_size for part in done.parts)
        need_space(work, source.plan.bytes_quantized - finished)
        if done.parts:
            say(f"{len(done.parts)} of {len(source.blocks)} blocks are done already")
        hidden, calls = _embed(source, ids)
        fmt = format_named(source.plan.format)
        for i, name in enumerate(progress(list(source.blocks))):
            _fill(source, lambda tensor, name=name: tensor.startswith(f"{name}."))  # type: ignore[misc]
            block = Block(name, source.blocks[name], source.layers(name), calls[name])
            if i < len(done.parts):
                use(block, _codes(source, done.folder / done.parts[i]["file"], block, fmt))
                advance(block, hidden)
            else:
                solved = solve(block, hidden, method(config.method), source.dtype)
                _commit(done, source, block, solved, fmt, i)
            block.module.to("meta")
        _assemble(source, done, stage)
        return source.plan, done.parts


def digest_of(ids: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(f"{tuple(ids.shape)} ".encode() + ids.numpy().tobytes()).hexdigest()


def _open(folder: Path, config: HfQuantConfig) -> _Source:
    checkpoint = Checkpoint.open(folder)
    stored = AutoConfig.from_pretrained(folder)
    if getattr(stored, "is_encoder_decoder", False) or not class_of(stored).can_generate():
        raise HfQuantError(f"{config.method} calibrates decoder-only models so far, not {class_of(stored).__name__}")
    dtype = stored.dtype if isinstance(stored.dtype, torch.dtype) else torch.float32
    with init_empty_weights(include_buffers=False):
        model = class_of(stored)._from_config(stored, dtype=dtype).eval()
    config = copy.deepcopy(config)
    plan = make_plan(model, config)
    blocks = _blocks(model)
    for name in plan.schemes:
        if not any(name.startswith(f"{block}.") for block in blocks):
            raise PlanError(f"{config.method} calibrates the layers of blocks so far, and {name} is in none")
        if f"{name}.weight" not in checkpoint.tensors:
            raise HfQuantError(f"{config.method}: the checkpoint has no tensor {name}.weight; stacked experts and renamed "
                               "tensors cannot be calibrated yet")  # fmt: skip
    freeze(config, plan)
    return _Source(checkpoint, model, plan, config, blocks, dtype)


def _blocks(model: Any) -> dict[str, nn.Module]:
    """The decoder layers by name, in order."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{name}.{i}": block for i, block in enumerate(module)}
    raise HfQuantError(f"{type(model).__name__}: no list of {count} blocks found")


def _fill(source: _Source, wanted: Callable[[str], bool]) -> None:
    """Read the parameters whose names are wanted, in float32: faster than bf16 on most CPUs, and nothing is lost."""
    for name, parameter in list(source.model.named_parameters()):
        if wanted(name):
            tensor = source.checkpoint.read(name)
            if tensor.shape != parameter.shape:
                raise HfQuantError(
                    f"tensor {name} has shape {list(tensor.shape)}, config.json says {list(parameter.shape)}"
                )
            path, _, leaf = name.rpartition(".")
            source.model.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor.float(), False))


def _embed(source: _Source, ids: Tensor) -> tuple[list[Tensor], dict[str, Call]]:
    """What enters the first block, and what each block is called with: the model is run with blocks that do nothing."""
    model, base = source.model, source.model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    _fill(source, lambda name: name.startswith(prefix) and source.owner(name) is None)
    calls: dict[str, Call] = {}
    entered: list[Tensor] = []

    def stand_in(name: str, first: bool) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls[name] = (args, kwargs)
            entered.extend([hidden] if first else [])
            return hidden

        return forward

    size = next(n for n in range(min(BATCH, len(ids)), 0, -1) if len(ids) % n == 0)  # all batches alike
    for i, (name, block) in enumerate(source.blocks.items()):
        block.forward = stand_in(name, i == 0)
    try:
        for batch in ids.split(size):
            base(input_ids=batch, use_cache=False)
    finally:
        for block in source.blocks.values():
            del block.forward
    return entered, calls


def _codes(source: _Source, file: Path, block: Block, fmt: Format) -> dict[str, QuantizedTensor]:
    tensors = load_file(file)
    made = {}
    for name, scheme in block.layers.items():
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        made[name] = fmt.read(own, scheme)
    return made


def _commit(done: Journal, source: _Source, block: Block, solved: Solved, fmt: Format, index: int) -> None:
    tensors = {f"{n}.{local}": t for n, codes in solved.codes.items() for local, t in fmt.write(codes).items()}
    for name in source.checkpoint.tensors:
        if name.startswith(f"{block.name}.") and name.removesuffix(".weight") not in block.layers:
            tensors[name] = source.checkpoint.read(name)
    record = {
        "block": block.name, "error": solved.error, "sqnr_db": solved.sqnr_db, "layers": solved.errors,
        "notes": solved.notes,
    }  # fmt: skip
    done.add(
        f"block-{index:05d}.safetensors",
        lambda path: write_tensors(path, tensors),
        record,
    )


def _assemble(source: _Source, done: Journal, stage: Path) -> None:
    """A complete checkpoint: the files of the finished blocks, one more for all the rest, and an index."""
    count = len(done.parts) + 1
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, part in zip(names, done.parts, strict=False):
        link_file(done.folder / part["file"], stage / name)
    rest = {n: source.checkpoint.read(n) for n in source.checkpoint.tensors if source.owner(n) is None}
    write_tensors(stage / names[-1], rest)
    found = {name: read_header(stage / name) for name in names}
    size = sum(info.nbytes for tensors in found.values() for info in tensors.values())
    index = {tensor: name for name, tensors in found.items() for tensor in tensors}
    write_json(stage / INDEX, {"metadata": {"total_size": size}, "weight_map": index})
    config = json.loads((source.checkpoint.folder / "config.json").read_text())
    config["quantization_config"] = source.config.to_dict()
    write_json(stage / "config.json", config)
    generation = source.checkpoint.folder / "generation_config.json"
    if generation.is_file():
        copy_file(generation, stage / generation.name)
