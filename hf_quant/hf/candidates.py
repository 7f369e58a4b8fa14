"""All weights of a model that can be quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quant.nn.experts import stacks, why_not_experts

Kind = Literal["linear", "conv1d", "experts", "embedding"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A weight that can be quantized: the ``weight`` of a module, or a stack of an experts layer."""

    kind: Kind
    shape: tuple[int, ...]  # [N, K], or [E, N, K]
    refusal: str | None = None

    @property
    def in_features(self) -> int:
        """The number of columns, K."""
        return self.shape[-1]


def candidates(model: Any) -> dict[str, Candidate]:
    """All weights of ``model`` that can be quantized, by name; the model may be on the meta device."""
    by_name: dict[str, Candidate] = {}
    embedding = _input_embeddings(model)
    for name, module in model.named_modules():
        by_name |= dict(_candidates_in(name, module, module is embedding))
    return by_name


def _input_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # models of images or sounds have none
        return None


def _candidates_in(name: str, module: nn.Module, is_embedding: bool) -> Iterator[tuple[str, Candidate]]:
    if type(module) is nn.Linear:
        yield name, Candidate("linear", (module.out_features, module.in_features))
    elif isinstance(module, nn.Linear):
        reason = f"{type(module).__name__} computes with its weight in its own way"
        yield name, Candidate("linear", (module.out_features, module.in_features), reason)
    elif type(module) is Conv1D:
        k, n = module.weight.shape
        yield name, Candidate("conv1d", (n, k))
    elif is_embedding and isinstance(module, nn.Embedding):
        refusal = None if type(module) is nn.Embedding else f"{type(module).__name__} scales its rows in its own way"
        yield name, Candidate("embedding", (module.num_embeddings, module.embedding_dim), refusal)
    else:
        for stack, shape in stacks(module).items():
            yield f"{name}.{stack}", Candidate("experts", shape, why_not_experts(module))
