"""Calibrated quantization of stacked experts, each on the tokens that the router sends to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.geometry import geometry_of
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.stats import InputStats
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.methods import quantize
from hf_quant.nn.experts import expert_input, stacks
from hf_quant.solve.block import Block, put
from hf_quant.solve.hidden_states import HiddenStates
from hf_quant.solve.inputs import HELD, Group, inputs_of, reduce
from hf_quant.solve.latent import offset_of
from hf_quant.solve.result import Recipe, Solved, with_range

EXPERT_HELD = 256  # largest number of rows of one expert that are held out
STARVED = 32  # an expert with fewer tokens is rounded to nearest without data
EXPERTS = 1 << 30  # bytes of statistics of experts collected in one pass; more experts take more passes


def solve_experts(
    block: Block, group: Group, hidden: HiddenStates, mine: list[int], recipe: Recipe, solved: Solved
) -> None:
    """Quantize all experts, each on the tokens that are sent to it; the projections into the experts first."""
    path = group.layers[0].rpartition(".")[0]
    module: Any = block.module.get_submodule(path)
    shapes = stacks(module)
    for local in sorted(group.layers, key=lambda name: list(shapes).index(name.rpartition(".")[2])):
        name, stack = block.full(local), local.rpartition(".")[2]
        count, _, k = shapes[stack]
        step, parts, lost = max(1, EXPERTS // (8 * k * k)), [], []
        solved.experts[name] = []
        for start in range(0, count, step):
            chunk = range(start, min(start + step, count))
            stats = {e: InputStats.empty(k, getattr(module, stack).device) for e in chunk}
            for i in mine:
                batch = hidden.batch(i, block.name)
                states, chosen, *_ = inputs_of(block, block.module, [path], batch, repeated=group.repeated)[path]
                for e in chunk:
                    inputs = expert_input(module, stack, e, states.reshape(-1, states.shape[-1]), chosen)
                    stats[e].update(inputs, held=HELD if stats[e].seen < HELD * EXPERT_HELD else 0)
            for e in chunk:
                reduce(stats[e], recipe.ranks)
                owner, solution = recipe.ranks.owner(e), None
                if owner == recipe.ranks.rank:
                    solution = _solve_expert(module, stack, e, block.layers[name], stats[e], recipe)
                quantized, error, notes = recipe.ranks.shared(solution, owner)
                parts.append(quantized)
                lost.append(error)
                solved.experts[name].append(stats[e].seen)
                solved.note(name, notes)
        solved.codes[name] = QuantizedTensor.stack(parts)
        if (
            block.layers[name].activations == "tensor"
        ):  # an expert with few tokens has not seen the range of its inputs
            widest = torch.stack([part.input_scale for part in parts if part.input_scale is not None]).amax()
            solved.codes[name] = replace(solved.codes[name], input_scale=widest.expand(count, 1).contiguous())
        if few := [e for e, seen in enumerate(solved.experts[name]) if seen < STARVED]:
            solved.starved[name] = few
        solved.errors[name] = sum(lost) / len(lost)
        if recipe.decision.learning(block.layers[name]) is not None:
            dense: Tensor = getattr(module, stack).data
            solved.offsets[name] = offset_of(geometry_of(module).matrix(dense), solved.codes[name])
        put(block, name, solved.codes[name].dequantize(torch.float32))


def _solve_expert(
    module: Any, stack: str, expert: int, scheme: QuantScheme, stats: InputStats, recipe: Recipe
) -> tuple[QuantizedTensor, float, list[str]]:
    dense: Tensor = getattr(module, stack)[expert]
    weight = geometry_of(module).matrix(dense).contiguous()
    if stats.seen < STARVED:
        quantized = quantize(recipe.decision.without_data(), weight, scheme, recipe.dtype)
        notes = [f"expert {expert} saw {stats.seen} tokens: rounded to nearest"]
    else:
        quantized = quantize(recipe.decision.solver(scheme), weight, scheme, recipe.dtype, stats)
        notes = [f"expert {expert}: {note}" for note in stats.notes]
    quantized = with_range(quantized, stats.peak)
    return quantized.cpu(), stats.error(weight, quantized.dequantize(torch.float32)), notes
