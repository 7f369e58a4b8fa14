"""Calibrated quantization of a checkpoint that is never loaded whole: block by block from its shards, resumable."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.private_torch import tree_map_only
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.data.batches import Inputs
from hf_quant.data.calibration import Calibration
from hf_quant.disk.atomic import blaming, copy_file, link_file, need_space, write_json
from hf_quant.disk.journal import Journal, digest, open_journal
from hf_quant.disk.memory import free_memory, give_back_memory
from hf_quant.disk.safetensors import write_tensors
from hf_quant.errors import HfQuantError, UnchainedError
from hf_quant.formats import format_named
from hf_quant.hf._hooks import build
from hf_quant.hf.auto import class_of, config_of
from hf_quant.hf.batch_inputs import inputs_for
from hf_quant.hf.block_files import part_of, take_part, written
from hf_quant.hf.blocks import Around, Calls, blocks_of, layers_of, refuse_other_kinds
from hf_quant.hf.checkpoint_tensors import Tensors
from hf_quant.hf.config import HfQuantConfig
from hf_quant.hf.foreign_errors import explained
from hf_quant.hf.plan import Plan, freeze, make_plan
from hf_quant.hf.rounded import outside, rounded
from hf_quant.hf.shards import write_index
from hf_quant.hf.whole import NOTE, WHOLE, entering, refuse_whole, whole
from hf_quant.solve.block import Block, Stored, inside
from hf_quant.solve.hidden_states import HiddenStates
from hf_quant.solve.ranks import ALONE, Ranks
from hf_quant.solve.result import Recipe, Solved
from hf_quant.solve.solve import advance, solve
from hf_quant.solve.whole import solve_whole

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
        return next((name for name in self.blocks if tensor.startswith(inside(name))), None)


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
    source, ranks = _open(folder, config, settings.trust_remote_code, text=not data.batches), settings.ranks
    batches = inputs_for(source.model, data.batches)
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
        around, source = _around(source, data.ids, batches, settings)
        rounded = _round_outside(source, around, recipe)
        parts = ranks.shared(done.parts if done else None)
        if done is not None:
            finished = sum((work / part["file"]).stat().st_size for part in parts)
            need_space(work, source.plan.bytes_quantized - finished)
        if [part.get("block") for part in parts] != list(source.blocks)[: len(parts)]:
            raise HfQuantError(f"{work}: its journal names other blocks than the model has; delete it to begin anew")
        if parts:
            settings.say(f"{len(parts)} of {len(source.blocks)} blocks are done already")
        if done is not None and not parts and WHOLE in source.blocks:
            _calibrate_whole(source, around, recipe, done, settings.device)
        elif len(parts) < len(source.blocks):
            with _beside(work) as scratch:
                _walk(source, around, recipe, done, work, len(parts), scratch, settings)
        if done is None:
            return source.plan, []
        _assemble(source, done, rounded, stage)
        report(done.parts, settings.say)
        return source.plan, done.parts


def _walk(
    source: _Source, around: Around, recipe: Recipe, done: Journal | None, work: Path, finished: int, scratch: Path,
    settings: Settings,
) -> None:  # fmt: skip
    """Block by block: finished blocks are only run, the others are quantized and committed."""
    followed = recipe.decision.needs_twin(source.plan.schemes.values())
    results: list[dict[str, HiddenStates]] = [{}, {}] if followed else [{}]
    chain: list[str] = []
    chains = iter(around.chains)
    for i, name in enumerate(settings.progress(list(source.blocks))):
        if name not in chain:
            chain = next(chains)
            streams, calls = _enter(source, around, chain, results, scratch, settings)
            for result, states in zip(results, streams, strict=True):
                result[chain[-1]] = states
        block = _block(source, name, streams, calls, settings.device)
        if i < finished:
            _pass_by(source, block, work / _part(i), streams, recipe.ranks)
        else:
            solved = solve(block, streams[0], recipe, *streams[1:])
            if done is not None:
                _commit(done, source, block, solved, i)
            recipe.ranks.barrier()  # no rank continues before the block is on disk
        if name in around.kept:
            for number, (result, states) in enumerate(zip(results, streams, strict=True)):
                disk = settings.max_memory is not None
                result[name] = states.copied(scratch / f"{name}-{number}" if disk else None)
        block.module.to("meta")
        give_back_memory()


def _calibrate_whole(source: _Source, around: Around, recipe: Recipe, done: Journal, device: str) -> None:
    """Quantize and commit a model whose blocks form no chains."""
    _fill(source, lambda _tensor: True)
    block = whole(source.model.to(device), source.plan, Stored(source.tensors.dtype, source.tensors.read))
    solved = solve_whole(block, entering(source.model, around), recipe)
    _commit(done, source, block, solved, 0)
    source.model.to("meta")


def _block(source: _Source, name: str, streams: list[HiddenStates], calls: Calls, device: str) -> Block:
    """A block with its weights, on the device, and its arguments there too."""
    call, alone = tree_map_only(Tensor, lambda tensor: tensor.to(device), calls[name])
    _fill(source, lambda tensor: tensor.startswith(f"{name}."))
    source.blocks[name].to(device)
    stored = Stored(source.tensors.dtype, source.tensors.read)
    return Block(name, source.blocks[name], layers_of(source.plan, name), call, alone, stored=stored)


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


def _open(folder: Path, config: HfQuantConfig, trust_remote_code: bool, *, text: bool) -> _Source:
    checkpoint = Checkpoint.open(folder)
    hub = {"trust_remote_code": trust_remote_code}
    stored = config_of(str(folder), **hub)
    kind = class_of(stored, **hub)
    if text:
        refuse_other_kinds(kind, config.method)
    dtype = stored.dtype if isinstance(stored.dtype, torch.dtype) else torch.float32
    with explained(str(folder)), init_empty_weights(include_buffers=False):
        model = build(kind, stored, dtype).eval()
    config = copy.deepcopy(config)
    plan = make_plan(model, config)
    blocks = blocks_of(model, plan)
    freeze(config, plan)
    return _Source(checkpoint, Tensors(checkpoint, model), model, plan, config, blocks, dtype)


def _fill(source: _Source, wanted: Callable[[str], bool]) -> None:
    """Read parameters by name, in float32, which is faster than bf16 on most CPUs and loses nothing.

    Embeddings outside of blocks stay mapped from the file, since only a few rows are read. All others are copies, since they are changed and
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
            mapped = isinstance(module, nn.Embedding) and source.owner(name) is None
            kept = tensor if mapped else tensor.to(torch.float32, copy=True)
            module.register_parameter(leaf, nn.Parameter(kept, False))
    for name, buffer in list(source.model.named_buffers()):
        if wanted(name) and source.tensors.holds(name):
            path, _, leaf = name.rpartition(".")
            dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
            setattr(source.model.get_submodule(path), leaf, source.tensors.read(name).to(dtype, copy=True))


def _around(source: _Source, ids: Tensor, batches: Sequence[Inputs], settings: Settings) -> tuple[Around, _Source]:
    """The model around its blocks, with its weights, and the source with those blocks only that run, in their order."""
    model = source.model
    ranks = settings.ranks
    around = Around.of(model, source.blocks, ids, batches, ranks)
    prefix, firsts = "" if around.base is model else _prefix(model), around.first_blocks()
    _fill(source, lambda name: name.startswith(prefix) and source.owner(name) in (None, *firsts))
    try:
        around.find_chains()
    except UnchainedError as reason:
        refuse_whole(source.plan, ranks, reason)
        settings.say(f"{reason}: {NOTE}")
        return replace(around, chains=[[WHOLE]]), replace(source, blocks={WHOLE: model})
    if ranks.world > 1 and len(around.chains) > 1:  # a process knows only its own share of the outputs of a chain
        raise HfQuantError(
            f"{type(model).__name__}: its chains of blocks are calibrated by one process, not {ranks.world}"
        )
    for name in firsts:
        _empty(source.blocks[name])
    return around, replace(source, blocks={name: source.blocks[name] for chain in around.chains for name in chain})


def _empty(block: nn.Module) -> None:
    """Give back the memory of a block that will be filled again; its buffers would not be."""
    for module in block.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(leaf, nn.Parameter(parameter.to("meta"), False))


def _prefix(model: Any) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _round_outside(source: _Source, around: Around, recipe: Recipe) -> dict[str, QuantizedTensor]:
    """The codes of layers that calibration does not reach; the model computes with them from now on."""
    names = outside(source.plan, around.chains)
    _fill(source, lambda tensor: tensor.removesuffix(".weight") in names)
    return {name: rounded(source.model, name, source.plan, recipe) for name in names}


def _enter(
    source: _Source, around: Around, chain: list[str], results: list[dict[str, HiddenStates]], scratch: Path,
    settings: Settings,
) -> tuple[list[HiddenStates], Calls]:  # fmt: skip
    """The inputs of a chain (twice if the float model is followed), and the arguments of its blocks."""
    _fill(source, lambda name: name.startswith(f"{chain[0]}."))
    embeddings = [module.embedding_dim for module in around.base.modules() if isinstance(module, nn.Embedding)]
    width = getattr(source.model.config.get_text_config(), "hidden_size", None) or max(embeddings, default=1024)
    width = max(width) if isinstance(width, list | tuple) else width
    tokens = around.ids.numel() + sum(_rows(batch) for batch in around.batches)
    need = tokens * width * 4 * len(results) * len(around.chains)
    room = settings.max_memory if settings.max_memory is not None else free_memory() // 2
    if need > room:
        settings.say(f"{need / 1e9:.1f} GB of activations go to disk")
    number = around.chains.index(chain)
    files = [None if need <= room else scratch / f"{number}-{stream}" for stream in range(len(results))]
    streams, calls = around.enter(chain, results, files)
    if chain is around.chains[-1]:
        for module in around.base.modules():
            if isinstance(module, nn.Embedding):  # which may be larger than a block, and are no longer needed
                module.to("meta")
    return streams, calls


def _rows(batch: Inputs) -> int:
    """About the number of tokens that a batch becomes: as many as there are, or as 16 x 16 patches of three channels."""
    longest = max(tensor.numel() for tensor in batch.values())
    return max(batch["input_ids"].numel() if "input_ids" in batch else 0, longest // 768)


def _pass_by(source: _Source, block: Block, file: Path, streams: list[HiddenStates], ranks: Ranks) -> None:
    """Run a finished block, and the float block too if the float model is followed."""
    if len(streams) > 1:
        advance(block, streams[1], ranks)
    take_part(block, file, format_named(source.plan.format))
    advance(block, streams[0], ranks)


def _commit(done: Journal, source: _Source, block: Block, solved: Solved, index: int) -> None:
    tensors = part_of(block, solved.codes, format_named(source.plan.format), source.tensors)
    done.add(_part(index), lambda path: write_tensors(path, tensors), solved.record(block.name))


def _assemble(source: _Source, done: Journal, rounded: Mapping[str, QuantizedTensor], stage: Path) -> None:
    """Write a complete checkpoint: the files of the blocks, a file for all other tensors, and an index."""
    count = len(done.parts) + 1
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, part in zip(names, done.parts, strict=False):
        link_file(done.folder / part["file"], stage / name)
    fmt = format_named(source.plan.format)
    others = dict(source.tensors.outside(source.blocks, {*rounded, *(f"{layer}.weight" for layer in rounded)}))
    write_tensors(stage / names[-1], others | written(source.model, rounded, fmt))
    write_index(stage, names)
    config = json.loads((source.checkpoint.folder / "config.json").read_text())
    config["quantization_config"] = source.config.to_dict()
    write_json(stage / "config.json", config)
    generation = source.checkpoint.folder / "generation_config.json"
    if generation.is_file():
        copy_file(generation, stage / generation.name)
