"""Calibrated quantization of a model in memory, for ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_quant.data.batches import are_batches
from hf_quant.data.calibration import Calibration, calibration
from hf_quant.data.chat import Chat
from hf_quant.errors import CheckpointError, HfQuantError, UnchainedError
from hf_quant.hf._hooks import download_options
from hf_quant.hf.auto import hub_options, tokenizer_of, vocabulary_of
from hf_quant.hf.batch_inputs import inputs_for
from hf_quant.hf.blocks import Around, blocks_of, layers_of, refuse_other_kinds
from hf_quant.hf.config import HfQuantConfig
from hf_quant.hf.plan import Plan
from hf_quant.hf.rounded import outside, rounded
from hf_quant.hf.whole import NOTE, WHOLE, entering, refuse_whole, whole
from hf_quant.nn._weight import frozen
from hf_quant.solve.block import Block, Stored, parameter_in
from hf_quant.solve.hidden_states import HiddenStates
from hf_quant.solve.ranks import ALONE
from hf_quant.solve.result import Recipe
from hf_quant.solve.solve import solve
from hf_quant.solve.whole import solve_whole

logger = logging.get_logger(__name__)

CONTEXT = 512
ALIGNED = 64  # bytes; where PyTorch's own memory begins
NARROW = (torch.bfloat16, torch.float16)  # dtypes that are cast to float32 for calibration


def context_of(config: Any) -> int:
    """Tokens in a window: 512, or the maximum of the model."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(CONTEXT, limit) if isinstance(limit, int) and limit > 1 else CONTEXT


def data_for(config: HfQuantConfig, model: Any) -> Calibration:
    """The calibration data of the configuration, as tokens of ``model``, which may be on the meta device.

    Raises:
        HfQuantError: There are none, or the model does not read them; says why.
    """
    data = _read(config, model)
    if not inputs_for(model, data.batches):
        refuse_other_kinds(type(model), config.method)
    return data


def _read(config: HfQuantConfig, model: Any) -> Calibration:
    if are_batches(config.calibration):
        return Calibration.of_batches(config.calibration)
    # whoever loaded a class that the checkpoint defines has trusted its code
    own_code = type(model).__module__.startswith("transformers_modules.")
    where = hub_options(download_options())
    tokenizer, ids = None, isinstance(config.calibration, torch.Tensor)
    with suppress(CheckpointError) if ids else nullcontext():
        tokenizer = tokenizer_of(model.config.name_or_path, **where, trust_remote_code=own_code)
    if tokenizer is None and not ids:
        raise HfQuantError("calibration: no tokenizer beside the model, pass token ids instead")
    vocabulary = vocabulary_of(model.config)
    chat, context = Chat(tokenizer, config.chat_template_kwargs), context_of(model.config)
    data = calibration(config.calibration, tokenizer, context, config.calibration_tokens, vocabulary, chat)
    chat.refuse_unused()
    return data


class Place(Protocol):
    """Stores the codes of a layer, or of a stack of experts, in the model."""

    def __call__(self, layer: str, parts: dict[str, nn.Parameter]) -> None: ...


@torch.no_grad()
def calibrate(model: Any, plan: Plan, config: HfQuantConfig, data: Calibration, place: Place) -> list[dict[str, Any]]:
    """Quantize the layers of ``plan`` block by block, in float32, one block at a time.

    Args:
        model: In floating point, loaded.
        plan: The plan.
        config: The settings.
        data: The calibration data.
        place: Called with the name of each layer and its parts (`core.layout`); stores them in the model.

    Returns:
        A record of each block.
    """
    batches = inputs_for(model, data.batches)
    blocks, recipe, records = blocks_of(model, plan), Recipe(plan.decision, model.dtype), []
    around = Around.of(model, blocks, data.ids.to(model.device), batches, ALONE)
    inside = tuple(f"{name}." for name in blocks)
    others = [
        m for n, m in model.named_modules() if not f"{n}.".startswith(inside) and not isinstance(m, nn.Embedding)
    ]
    entry = [p for m in others for p in _tensors(m, recurse=False)]
    entry += [p for name in around.first_blocks() for p in _tensors(blocks[name])]
    try:
        with _in_float32(entry):
            around.find_chains()
    except UnchainedError as reason:
        refuse_whole(plan, ALONE, reason)
        logger.info("%s: %s", reason, NOTE)
        return [_calibrate_whole(model, plan, recipe, around, place)]
    coded = {name: rounded(model, name, plan, recipe) for name in outside(plan, around.chains)}
    followed = recipe.decision.needs_twin(plan.schemes.values())
    results: list[dict[str, HiddenStates]] = [{}, {}] if followed else [{}]
    for chain in around.chains:
        with _in_float32(entry):
            streams, calls = around.enter(chain, results, [None] * len(results))
        for name in chain:
            module = blocks[name]
            stored = _stored(name, module, followed=followed)
            block = Block(name, module, layers_of(plan, name), *calls[name], stored=stored)
            with _in_float32(_tensors(module)):
                solved = solve(block, streams[0], recipe, *streams[1:])
            for layer, codes in solved.codes.items():
                place(layer, {part: frozen(tensor) for part, tensor in codes.parts().items()})
            records.append(solved.record(name))
            if name in around.kept:
                for result, states in zip(results, streams, strict=True):
                    result[name] = states.copied(None)
        for result, states in zip(results, streams, strict=True):
            result[chain[-1]] = states
    for layer, codes in coded.items():
        parameter, _ = parameter_in(model, layer)
        parameter.data = parameter.data.to(model.dtype)
        place(layer, {part: frozen(tensor) for part, tensor in codes.parts().items()})
    return records


def _calibrate_whole(model: Any, plan: Plan, recipe: Recipe, around: Around, place: Place) -> dict[str, Any]:
    """`calibrate` for a model whose blocks form no chains."""
    block = whole(model, plan, _stored(WHOLE, model, followed=False))
    with _in_float32(_tensors(model)):
        solved = solve_whole(block, entering(model, around), recipe)
    for layer, codes in solved.codes.items():
        place(layer, {part: frozen(tensor) for part, tensor in codes.parts().items()})
    return solved.record(WHOLE)


def _stored(name: str, module: nn.Module, *, followed: bool) -> Stored:
    """The original parameters of a block, which are kept if the float model is followed, since the block changes."""
    dtypes, kept = {}, {}
    for full, parameter in module.named_parameters(prefix=name):
        dtypes[full] = parameter.dtype
        if followed:
            kept[full] = parameter.data if parameter.dtype in NARROW else parameter.data.clone()
    return Stored(dtypes.__getitem__, kept.__getitem__)


def _tensors(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    """Parameters, and buffers such as the means of batch normalization."""
    buffers = [buffer for buffer in module.buffers(recurse) if buffer.is_floating_point()]
    return [*module.parameters(recurse), *buffers]


@contextmanager
def _in_float32(parameters: list[Tensor]) -> Iterator[None]:
    """Inside, parameters in bf16 or fp16 are in float32; afterwards they have their dtype again.

    Others are copied where they lie in the file they were read from, at any byte, and none of them needs gradients: the last digits
    of a product of matrices depend on where they begin, and on whether PyTorch folds it into one of two dimensions, which it does
    for a weight that needs gradients. Calibration in memory and block by block from disk give the same.
    """
    wanted = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter in parameters:
        if parameter.dtype not in NARROW and parameter.data_ptr() % ALIGNED:
            parameter.data = parameter.data.clone()
        parameter.requires_grad_(False)
    parameters = [p for p in parameters if p.dtype in NARROW]
    dtypes = [p.dtype for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
        for parameter, needed in wanted:
            parameter.requires_grad_(needed)
