"""The decoder blocks of a model, whether they can be calibrated, and their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import HfQuantError, PlanError
from hf_quant.hf.block_calls import Calls, passed_through
from hf_quant.hf.plan import Plan
from hf_quant.solve.hidden_states import HiddenStates
from hf_quant.solve.ranks import Ranks

BATCH = 2  # sequences in a batch of hidden states; larger batches exceed the processor's caches and gain nothing


def layers_of(plan: Plan, block: str) -> dict[str, QuantScheme]:
    """The quantized layers of a block, in the order of the model."""
    return {name: scheme for name, scheme in plan.schemes.items() if name.startswith(f"{block}.")}


def refuse_other_kinds(kind: Any, config: Any, method: str) -> None:
    """Refuse models other than decoders; ``kind`` is the class of the model."""
    if getattr(config, "is_encoder_decoder", False) or not getattr(kind, "can_generate", bool)():
        raise HfQuantError(f"{method} calibrates decoder-only models so far, not {kind.__name__}")


def refuse_outside_blocks(plan: Plan, blocks: Mapping[str, nn.Module], method: str) -> None:
    """Refuse to calibrate the output head and embeddings."""
    for name in plan.schemes:
        if not any(name.startswith(f"{block}.") for block in blocks):
            raise PlanError(f"{method} calibrates the layers of blocks so far, and {name} is in none")


def blocks_of(model: Any) -> dict[str, nn.Module]:
    """The decoder layers by name, in order."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{name}.{i}": block for i, block in enumerate(module)}
    raise HfQuantError(f"{type(model).__name__}: no list of {count} blocks found")


def embed(
    base: Any, blocks: Mapping[str, nn.Module], ids: Tensor, file: Path | None, ranks: Ranks
) -> tuple[HiddenStates, Calls]:
    """The hidden states that enter the first block, and the arguments of all blocks.

    The first block is computed once, to find out in which form blocks return hidden states.

    Raises:
        HfQuantError: The arguments of a block differ between batches, or depend on what another block has computed.
    """
    size = next(n for n in range(min(BATCH, max(1, len(ids) // max(2, ranks.world))), 0, -1) if len(ids) % n == 0)
    hidden_states: HiddenStates | None = None
    wide = base.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.float())
    try:
        with passed_through(blocks) as seen:
            for number, batch in enumerate(ids.split(size)):
                base(input_ids=batch, use_cache=False)
                states = seen.entered.pop()
                hidden_states = hidden_states or HiddenStates.room(
                    (len(ids), *states.shape[1:]), size, torch.float32, file
                )
                hidden_states.put(number, states)
            together, seen.calls = seen.calls, {}
            if size > 1:
                base(input_ids=ids[:1], use_cache=False)
    finally:
        wide.remove()
    assert hidden_states is not None
    alone = seen.calls or together
    return hidden_states, {name: (call, alone[name]) for name, call in together.items()}
