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

from hf_quant.core.geometry import patches_of
from hf_quant.nn.experts import stacks, why_not_experts

BASES: dict[type[nn.Module], tuple[int, ...]] = {  # shapes of inputs with four features
    nn.Linear: (2, 5, 4), nn.Conv1d: (2, 4, 5), nn.Conv2d: (2, 4, 5, 5), nn.Conv3d: (2, 4, 5, 5, 5)
}  # fmt: skip
ROUNDING = 1e-5  # what sums of four products, taken in another order, may differ by
Kind = Literal["linear", "conv1d", "patches", "experts", "embedding"]


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
    kind: Any = type(module)  # mypy doubts that classes can be hashed
    if isinstance(module, nn.Linear):
        yield name, Candidate("linear", (module.out_features, module.in_features), why_not_plain(kind))
    elif type(module) is Conv1D:
        k, n = module.weight.shape
        yield name, Candidate("conv1d", (n, k))
    elif is_embedding and isinstance(module, nn.Embedding):
        refusal = None if kind is nn.Embedding else f"{kind.__name__} scales its rows in its own way"
        yield name, Candidate("embedding", (module.num_embeddings, module.embedding_dim), refusal)
    elif (patches := patches_of(module)) is not None:
        rows: Any = module.out_channels
        yield name, Candidate("patches", (rows, patches.columns), why_not_plain(kind))
    else:
        for stack, shape in stacks(module).items():
            yield f"{name}.{stack}", Candidate("experts", shape, why_not_experts(module))


@lru_cache
def why_not_plain(kind: Any) -> str | None:
    """Why layers of a subclass of ``nn.Linear``, or of a convolution, cannot be replaced; None if they compute what those compute.

    A small layer of that class, without what its own ``__init__`` may add, is compared with its base, in float32 whatever the
    default is: inside of ``from_pretrained`` it is the dtype of the model, in which two ways to add a bias differ.
    """
    base: Any = next(base for base in BASES if issubclass(kind, base))
    if kind is base:
        return None
    refusal = f"{kind.__name__} computes with its weight in its own way"
    random = torch.Generator(device="cpu").manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        plain = base(4, 3, dtype=torch.float32) if base is nn.Linear else base(4, 3, 1, dtype=torch.float32)
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float32))
        other = kind.__new__(kind)
        other.__dict__.update(copy.deepcopy(plain).__dict__)
        x = torch.randn(BASES[base], generator=random, dtype=torch.float32)
        try:
            same = all(torch.allclose(other(rows), plain(rows), atol=ROUNDING) for rows in (x, x[0]))
            for layer in (other, plain):
                layer.register_parameter("bias", None)
            return None if same and torch.allclose(other(x), plain(x), atol=ROUNDING) else refusal
        except Exception:  # of any type: the class's own code
            return refusal
