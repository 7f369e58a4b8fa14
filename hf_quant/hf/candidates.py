"""All weights of a model that can be quantized."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
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
    if isinstance(module, nn.Linear):
        reason = why_not_linear(type(module))  # type: ignore[arg-type]  # mypy doubts that classes can be hashed
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


@lru_cache
def why_not_linear(kind: type[nn.Linear]) -> str | None:
    """Why layers of a subclass of ``nn.Linear`` cannot be replaced; None if they compute ``x @ W.T + b`` and nothing else.

    A small layer of that class, without what its own ``__init__`` may add, is compared with ``nn.Linear``.
    """
    if kind is nn.Linear or kind.forward is nn.Linear.forward:
        return None
    refusal = f"{kind.__name__} computes with its weight in its own way"
    random = torch.Generator(device="cpu").manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        plain = nn.Linear(4, 3)
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
        other = kind.__new__(kind)
        other.__dict__.update(copy.deepcopy(plain).__dict__)
        x = torch.randn(2, 5, 4, generator=random)
        try:
            same = all(torch.allclose(other(rows), plain(rows), atol=1e-6) for rows in (x, x[0]))
            for layer in (other, plain):
                layer.register_parameter("bias", None)
            return None if same and torch.allclose(other(x), plain(x), atol=1e-6) else refusal
        except Exception:  # of any type: the class's own code
            return refusal
