"""The decoder blocks of a model, whether they can be calibrated, and what enters them."""

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
from hf_quant.solve.hidden_states import Activations
from hf_quant.solve.ranks import Ranks

BATCH = 2  # sequences that walk up the model together: larger ones leave the caches, and take memory for nothing


def layers_of(plan: Plan, block: str) -> dict[str, QuantScheme]:
    """The layers of a block that are quantized, in the order of the model."""
    return {name: scheme for name, scheme in plan.schemes.items() if name.startswith(f"{block}.")}


def refuse_other_kinds(kind: Any, config: Any, method: str) -> None:
    """Only decoders are calibrated so far; ``kind`` is the class of the model."""
    if getattr(config, "is_encoder_decoder", False) or not getattr(kind, "can_generate", bool)():
        raise HfQuantError(f"{method} calibrates decoder-only models so far, not {kind.__name__}")


def refuse_outside_blocks(plan: Plan, blocks: Mapping[str, nn.Module], method: str) -> None:
    """Output head and embeddings are not calibrated so far."""
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
) -> tuple[Activations, Calls]:
    """Run a model whose blocks hand on what they are given: what enters the first one, and what each is called with.

    The first block computes once, which shows in what form blocks return hidden states.

    Raises:
        HfQuantError: A block is called with something else for each batch, or with what another one has computed.
    """
    size = next(n for n in range(min(BATCH, max(1, len(ids) // max(2, ranks.world))), 0, -1) if len(ids) % n == 0)
    made: Activations | None = None
    wide = base.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.float())
    try:
        with passed_through(blocks) as seen:
            for number, batch in enumerate(ids.split(size)):
                base(input_ids=batch, use_cache=False)
                states = seen.entered.pop()
                made = made or Activations.room((len(ids), *states.shape[1:]), size, torch.float32, file)
                made.put(number, states)
            together, seen.calls = seen.calls, {}
            if size > 1:
                base(input_ids=ids[:1], use_cache=False)
    finally:
        wide.remove()
    assert made is not None
    alone = seen.calls or together
    return made, {name: (call, alone[name]) for name, call in together.items()}
