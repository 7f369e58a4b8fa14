"""Calibrated quantization of a checkpoint that is never loaded whole: block by block from its shards, resumable."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.private_torch import tree_map_only
from hf_quant.data.calibration import Calibration
from hf_quant.disk.atomic import blaming, copy_file, link_file, need_space, write_json
from hf_quant.disk.journal import Journal, digest, open_journal
from hf_quant.disk.memory import free_memory, give_back_memory
from hf_quant.disk.safetensors import write_tensors
from hf_quant.errors import HfQuantError
from hf_quant.formats import format_named
from hf_quant.hf._hooks import build
from hf_quant.hf.auto import class_of, config_of
from hf_quant.hf.block_calls import Calls
from hf_quant.hf.block_files import part_of, take_part
from hf_quant.hf.blocks import blocks_of, embed, layers_of, refuse_other_kinds, refuse_outside_blocks
from hf_quant.hf.checkpoint_tensors import Tensors
from hf_quant.hf.config import HfQuantConfig
from hf_quant.hf.foreign_errors import explained
from hf_quant.hf.plan import Plan, freeze, make_plan
from hf_quant.hf.shards import write_index
from hf_quant.solve.block import Block, Stored
from hf_quant.solve.hidden_states import HiddenStates
from hf_quant.solve.ranks import ALONE, Ranks
from hf_quant.solve.result import Recipe, Solved
from hf_quant.solve.solve import advance, solve

FAR = 10  # times the median of all blocks' errors: worth a word
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class _Source:
    """A checkpoint, its model without weights, and the plan for it."""

    checkpoint: Checkpoint
    tensors: Tensors
    model: Any
    plan: Plan
    config: HfQuantConfig
    blocks: dict[str, nn.Module]
    dtype: torch.dtype  # the checkpoint's, and that of the scales; blocks are filled in float32

    def owner(self, tensor: str) -> str | None:
        """The block a tensor belongs to; None outside of blocks."""
        return next((name for name in self.blocks if tensor.startswith(f"{name}.")), None)


@dataclass(frozen=True)
class Settings:
    """How a job runs. Only the number of ranks and the kind of device affect the result, and only by rounding.

    Attributes:
        say: Told what is worth knowing.
        progress: Wraps the list of blocks.
        max_memory: Bytes that activations may take in memory before they go to disk; None: half of what is free now.
        ranks: The processes that share the job.
        device: Where blocks are worked on, one at a time; activations stay in main memory or on disk.
        trust_remote_code: Whether code in the checkpoint may run.
    """

    say: Callable[[str], None]
    progress: Progress = iter
    max_memory: int | None = None
    ranks: Ranks = ALONE
    device: str = "cpu"
    trust_remote_code: bool = False


def quantize_streaming(
    folder: Path, config: HfQuantConfig, data: Calibration, work: Path, stage: Path, settings: Settings
) -> tuple[Plan, list[dict[str, Any]]]:
    """Quantize the checkpoint in ``folder`` into ``stage``, going on with whatever ``work`` holds of the same job.

    Args:
        folder: Float checkpoint of a decoder-only model.
        config: The plan, with a calibrated method.
        data: What to calibrate on.
        work: Finished blocks and their journal; the caller removes it when all is done.
        stage: An empty folder; becomes a complete checkpoint.
        settings: How to run.

    Returns:
        The plan, and a record of each block: errors, notes, tokens seen by experts.

    Raises:
        HfQuantError: Something in the model, the checkpoint or the work folder is not as it must be.
    """
    source, ranks = _open(folder, config, settings.trust_remote_code), settings.ranks
    recipe = Recipe(source.plan.decision, source.dtype, ranks)
    job = {
        "source": {file.name: digest(file) for file in sorted({t.file for t in source.checkpoint.tensors.values()})},
        "config.json": digest(folder / "config.json"),
        "code": {file.name: digest(file) for file in sorted(folder.glob("*.py"))},
        "config": config.to_dict() | {"steps": source.plan.decision.asked()}, "calibration": data.sha256, "ranks": ranks.world,
        "device": torch.device(settings.device).type, "torch": torch.__version__,
        "transformers": version("transformers"), "hf-quant": version("hf-quant"),
    }  # fmt: skip
    ranks.barrier(patient=True)  # the first one may still be measuring the model before this
    opened = open_journal(work, job, settings.say) if ranks.first else nullcontext(None)
    with opened as done, torch.no_grad():
        parts = ranks.shared(done.parts if done else None)
        if done is not None:
            finished = sum((work / part["file"]).stat().st_size for part in parts)
            need_space(work, source.plan.bytes_quantized - finished)
        if [part.get("block") for part in parts] != list(source.blocks)[: len(parts)]:
            raise HfQuantError(f"{work}: its journal names other blocks than the model has; delete it to begin anew")
        if parts:
            settings.say(f"{len(parts)} of {len(source.blocks)} blocks are done already")
        if len(parts) < len(source.blocks):
            with _beside(work) as scratch:
                _walk(source, data.ids, recipe, done, work, len(parts), scratch, settings)
        if done is None:
            return source.plan, []
        _assemble(source, done, stage)
        report(done.parts, settings.say)
        return source.plan, done.parts


def _walk(
    source: _Source, ids: Tensor, recipe: Recipe, done: Journal | None, work: Path, finished: int, scratch: Path,
    settings: Settings,
) -> None:  # fmt: skip
    """Block by block: finished blocks are only run, the others are quantized and committed."""
    stored = Stored(source.tensors.dtype, source.tensors.read)
    streams, calls = _embed(source, ids, recipe.decision.needs_twin(source.plan.schemes.values()), scratch, settings)
    for i, name in enumerate(settings.progress(list(source.blocks))):
        call, alone = tree_map_only(Tensor, lambda tensor: tensor.to(settings.device), calls[name])
        block = Block(name, source.blocks[name], layers_of(source.plan, name), call, alone, stored=stored)
        _fill(source, lambda tensor, name=name: tensor.startswith(f"{name}."))  # type: ignore[misc]
        block.module.to(settings.device)
        if i < finished:
            _pass_by(source, block, work / _part(i), streams, recipe.ranks)
        else:
            solved = solve(block, streams[0], recipe, *streams[1:])
            if done is not None:
                _commit(done, source, block, solved, i)
            recipe.ranks.barrier()  # no rank continues before the block is on disk
        block.module.to("meta")
        give_back_memory()


def _part(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def report(parts: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
    """Report blocks with a much larger error than the others, and experts with too few tokens."""
    errors = sorted(part["error"] for part in parts)
    usual = errors[len(errors) // 2] if errors else 0.0
    for part in parts:
        if part["error"] > FAR * usual > 0:
            say(f"{part['block']}: its output error {part['error']:.2%} is far from the usual {usual:.2%}")
        starved = [
            f"{name} expert {e} saw {part['experts'][name][e]} tokens: rounded to nearest"
            for name, experts in part["starved"].items()
            for e in experts
        ]
        for line in starved[:3]:
            say(line)
        if len(starved) > 3:
            say(f"{part['block']}: {len(starved) - 3} more were rounded to nearest, see recipe.json")


@contextmanager
def _beside(work: Path) -> Iterator[Path]:
    """File for hidden states, beside the work folder; the system removes it when the process ends."""
    with blaming(work):
        work.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(dir=work, prefix="activations-", ignore_cleanup_errors=True)
    with temporary as folder:
        yield Path(folder)


def _open(folder: Path, config: HfQuantConfig, trust_remote_code: bool) -> _Source:
    checkpoint = Checkpoint.open(folder)
    hub = {"trust_remote_code": trust_remote_code}
    stored = config_of(str(folder), **hub)
    kind = class_of(stored, **hub)
    refuse_other_kinds(kind, stored, config.method)
    dtype = stored.dtype if isinstance(stored.dtype, torch.dtype) else torch.float32
    with explained(str(folder)), init_empty_weights(include_buffers=False):
        model = build(kind, stored, dtype).eval()
    config = copy.deepcopy(config)
    plan = make_plan(model, config)
    blocks = blocks_of(model)
    refuse_outside_blocks(plan, blocks, config.method)
    freeze(config, plan)
    return _Source(checkpoint, Tensors(checkpoint, model), model, plan, config, blocks, dtype)


def _fill(source: _Source, wanted: Callable[[str], bool]) -> None:
    """Read parameters by name, in float32, which is faster than bf16 on most CPUs and loses nothing.

    Embeddings stay mapped from the file, since only a few rows are read. All others are copies, since they are changed and
    read again.
    """
    for name, parameter in list(source.model.named_parameters()):
        if wanted(name):
            tensor = source.tensors.read(name)
            if tensor.shape != parameter.shape:
                raise HfQuantError(
                    f"tensor {name} has shape {list(tensor.shape)}, config.json says {list(parameter.shape)}"
                )
            path, _, leaf = name.rpartition(".")
            module = source.model.get_submodule(path)
            kept = tensor if isinstance(module, nn.Embedding) else tensor.to(torch.float32, copy=True)
            module.register_parameter(leaf, nn.Parameter(kept, False))


def _embed(
    source: _Source, ids: Tensor, twice: bool, scratch: Path, settings: Settings
) -> tuple[list[HiddenStates], Calls]:
    """The inputs of the first block (twice if the float model is followed), and the arguments of all blocks."""
    model, base = source.model, source.model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    _fill(source, lambda name: name.startswith(prefix) and source.owner(name) in (None, next(iter(source.blocks))))
    width = source.model.config.get_text_config().hidden_size
    shape = (*ids.shape, width)
    need = math.prod(shape) * 4 * (2 if twice else 1)
    room = settings.max_memory if settings.max_memory is not None else free_memory() // 2
    if need > room:
        settings.say(f"{need / 1e9:.1f} GB of activations go to disk")
    hidden, calls = embed(base, source.blocks, ids, None if need <= room else scratch / "hidden", settings.ranks)
    for module in base.modules():
        if isinstance(module, nn.Embedding):  # which may be larger than a block, and are no longer needed
            module.to("meta")
    streams = [hidden]
    if twice:
        other = HiddenStates.room(shape, hidden.size, torch.float32, None if need <= room else scratch / "original")
        other.copy_from(hidden)
        streams.append(other)
    return streams, calls


def _pass_by(source: _Source, block: Block, file: Path, streams: list[HiddenStates], ranks: Ranks) -> None:
    """Run a finished block, and the float block too if the float model is followed."""
    if len(streams) > 1:
        advance(block, streams[1], ranks)
    take_part(block, file, format_named(source.plan.format))
    advance(block, streams[0], ranks)


def _commit(done: Journal, source: _Source, block: Block, solved: Solved, index: int) -> None:
    tensors = part_of(block, solved.codes, format_named(source.plan.format), source.tensors)
    done.add(_part(index), lambda path: write_tensors(path, tensors), solved.record(block.name))


def _assemble(source: _Source, done: Journal, stage: Path) -> None:
    """Write a complete checkpoint: the files of the blocks, a file for all other tensors, and an index."""
    count = len(done.parts) + 1
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, part in zip(names, done.parts, strict=False):
        link_file(done.folder / part["file"], stage / name)
    write_tensors(stage / names[-1], dict(source.tensors.outside(source.blocks)))
    write_index(stage, names)
    config = json.loads((source.checkpoint.folder / "config.json").read_text())
    config["quantization_config"] = source.config.to_dict()
    write_json(stage / "config.json", config)
    generation = source.checkpoint.folder / "generation_config.json"
    if generation.is_file():
        copy_file(generation, stage / generation.name)
