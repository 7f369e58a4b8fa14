"""Linear layers: one of vLLM's is made of one or several of the checkpoint's, and of a part of each under tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, RowParallelLinear

import hf_quant
from hf_quant_vllm.arriving import Arrived, expect, forget


class LinearMethod(LinearMethodBase):
    """How vLLM loads and runs a linear layer.

    Args:
        schemes: Slug of each layer of the checkpoint that it is made of; None for one in floating point.
        prefix: Name of the layer.
    """

    def __init__(self, schemes: Sequence[str | None], prefix: str) -> None:
        super().__init__()
        self.schemes, self.prefix = schemes, prefix

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        for scheme in filter(None, self.schemes):
            refuse_cut_groups(self.prefix, scheme, input_size, input_size_per_partition)
        arrived: Arrived = {}

        def loader(name: str) -> Callable[..., None]:
            def load(parameter: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
                arrived.setdefault(shard, {})[name] = tensor.clone()

            return load

        expect(layer, "", loader)
        layer.arrived, layer.sizes, layer.kind = arrived, output_partition_sizes, params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Build the layers of the checkpoint, take this rank's part of each, and join those that fit together."""
        device, arrived = forget(layer, ""), layer.arrived
        shards = list(arrived) if len(arrived) < 2 else ["q", "k", "v"] if "q" in arrived else sorted(arrived)
        schemes = self.schemes if len(self.schemes) == len(shards) else list(self.schemes) * len(shards)
        parts = []
        for shard, scheme in zip(shards, schemes, strict=True):
            tensors = {name: tensor.to(device) for name, tensor in arrived[shard].items()}
            parts += self._parts(layer, shard, built(tensors, scheme, layer.kind, f"{self.prefix} {shard or ''}"))
        layer.arrived = None
        quantized = [part for part in parts if isinstance(part, hf_quant.QuantLinear)]
        whole = hf_quant.QuantLinear.joined(quantized) if len(quantized) == len(parts) > 1 else None
        layer.pieces = nn.ModuleList([whole] if whole is not None else parts)

    def _parts(self, layer: Any, shard: Any, whole: nn.Linear) -> list[nn.Linear]:
        """This rank's part; several where the checkpoint has one matrix of all projections."""
        if isinstance(layer, RowParallelLinear):
            return [narrowed(whole, 1, layer.tp_rank * layer.input_size_per_partition, layer.input_size_per_partition)]
        numbers = {"q": 0, "k": 1, "v": 2}
        if shard is not None:
            at = numbers.get(shard, shard)
            return [narrowed(whole, 0, self._rank(layer, at) * layer.sizes[at], layer.sizes[at])]
        if len(layer.sizes) == 1:
            return [narrowed(whole, 0, self._rank(layer, 0) * layer.sizes[0], layer.sizes[0])]
        ranks = layer.tp_size // getattr(layer, "num_kv_head_replicas", 1)
        parts, begin = [], 0
        for at, size in enumerate(layer.sizes):
            parts.append(narrowed(whole, 0, begin + self._rank(layer, at) * size, size))
            begin += size * (layer.tp_size if at == 0 else ranks)
        return parts

    @staticmethod
    def _rank(layer: Any, at: int) -> int:
        """Which part of a projection is this rank's: several ranks share a head of keys and values where there are few."""
        shared = isinstance(layer, QKVParallelLinear) and at > 0
        return layer.tp_rank // layer.num_kv_head_replicas if shared else getattr(layer, "tp_rank", 0)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs = [piece(x) for piece in layer.pieces]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias


class HeadMethod(LinearMethod):
    """How vLLM loads and runs a quantized output head, whose rows it fills up to a multiple of 64."""

    def process_weights_after_loading(self, layer: Any) -> None:
        device, tensors = forget(layer, ""), layer.arrived[None]
        whole = built(
            {name: tensor.to(device) for name, tensor in tensors.items()}, self.schemes[0], layer.kind, self.prefix
        )
        rows = layer.shard_indices
        count = rows.org_vocab_end_index - rows.org_vocab_start_index
        layer.arrived, layer.pieces = None, nn.ModuleList([narrowed(whole, 0, rows.org_vocab_start_index, count)])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = layer.pieces[0](x)
        y = F.pad(y, (0, layer.num_embeddings_per_partition - y.shape[-1]))
        return y if bias is None else y + bias

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """Vllm asks every method of a head for it; a head is not looked up."""
        raise NotImplementedError(f"{self.prefix}: an output head")


def built(tensors: dict[str, Tensor], scheme: str | None, dtype: torch.dtype, name: str) -> nn.Linear:
    """The layer of the tensors of the checkpoint.

    Raises:
        HfQuantError: They contradict the scheme; names the layer.
    """
    if scheme is None:
        dense = tensors["weight"].to(dtype)
        layer = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(dense, requires_grad=False)
        return layer
    try:
        return hf_quant.QuantLinear.from_tensors(tensors, scheme, dtype)
    except hf_quant.HfQuantError as error:
        raise hf_quant.HfQuantError(f"{name.strip()}: {error}") from None


def narrowed(layer: nn.Linear, axis: int, start: int, count: int) -> nn.Linear:
    """Some outputs (axis 0) or inputs (axis 1) of a layer."""
    if count == (layer.out_features, layer.in_features)[axis]:
        return layer
    if isinstance(layer, hf_quant.QuantLinear):
        return layer.narrowed(axis, start, count)
    layer.weight = nn.Parameter(layer.weight.narrow(axis, start, count).contiguous(), requires_grad=False)
    return layer


def refuse_cut_groups(name: str, scheme: str, columns: int, part: int) -> None:
    """Refuse, before anything is loaded, to share out columns in the middle of a group.

    Raises:
        HfQuantError: Names the layer and the tensor-parallel sizes that would do.
    """
    size = next((int(word[1:]) for word in scheme.split("-") if word[:1] == "g" and word[1:].isdigit()), 32)
    unit = 256 if scheme.endswith("_K") else max(32, size)  # a K-quant has one float16 for 256 columns
    if part == columns or part % unit == 0:
        return
    sizes = [tp for tp in range(1, columns // part + 1) if columns % tp == 0 and columns // tp % unit == 0]
    raise hf_quant.HfQuantError(
        f"{name}: a tensor-parallel size of {columns // part} leaves {part} of {columns} columns to each, which cuts the "
        f"groups of {unit} columns of {scheme}; {' or '.join(map(str, sizes))} does not"
    )
