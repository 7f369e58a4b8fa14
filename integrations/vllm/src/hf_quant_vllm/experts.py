"""Stacked experts: one after the other, each as linear layers of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

import hf_quant
from hf_quant_vllm.arriving import Arrived, expect, forget
from hf_quant_vllm.linear import built, narrowed, refuse_cut_groups


class ExpertsMethod(FusedMoEMethodBase):
    """How vLLM loads and runs the experts of a layer.

    Args:
        first: Slug of the scheme of gate and up projections.
        second: Slug of that of down projections.
        layer: Of vLLM.

    Raises:
        HfQuantError: Its experts are of a kind that is not run here.
    """

    def __init__(self, first: str, second: str, layer: Any) -> None:
        super().__init__(layer.moe_config)
        self.schemes = {"w1": first, "w3": first, "w2": second}

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        name, activation = layer.layer_name, getattr(layer.activation, "value", layer.activation)
        if activation != "silu" or self.moe.has_bias or layer.apply_router_weight_on_input:
            raise hf_quant.HfQuantError(
                f"{name}: experts with the activation {activation}, biases or weighted inputs are not run by this plug-in; "
                "those with SiLU and a gate are"
            )
        part = intermediate_size_per_partition
        refuse_cut_groups(name, self.schemes["w2"], part * layer.moe_config.tp_size, part)
        arrived: Arrived = {}

        def loader(leaf: str) -> Callable[..., bool]:
            def load(
                param: nn.Parameter, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int,
                return_success: bool = False,
            ) -> bool:  # fmt: skip
                local = layer._map_global_expert_id_to_local_expert_id(expert_id)
                if local != -1:
                    arrived.setdefault((local, shard_id), {})[leaf] = loaded_weight.clone()
                return local != -1

            return load

        expect(layer, "w13_", loader)
        expect(layer, "w2_", loader)
        layer.arrived, layer.kind, layer.inner = arrived, params_dtype, part

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM runs these experts."""
        return

    def process_weights_after_loading(self, layer: Any) -> None:
        """Build the layers of every expert, and take this rank's part of each."""
        device = forget(layer, "w13_")
        forget(layer, "w2_")
        begin = layer.moe_config.tp_rank * layer.inner
        layer.pieces = nn.ModuleDict()
        for (expert, shard), tensors in sorted(layer.arrived.items()):
            moved = {name: tensor.to(device) for name, tensor in tensors.items()}
            whole = built(moved, self.schemes[shard], layer.kind, f"{layer.layer_name} {expert} {shard}")
            layer.pieces[f"{expert} {shard}"] = narrowed(whole, int(shard == "w2"), begin, layer.inner)
        layer.arrived = None

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in torch.unique(topk_ids).tolist():
            local = layer._map_global_expert_id_to_local_expert_id(expert)
            if local == -1:  # another rank's
                continue
            token, choice = torch.where(topk_ids == expert)
            gate, up, down = (layer.pieces[f"{local} {shard}"] for shard in ("w1", "w3", "w2"))
            rows = x[token]
            y = down(F.silu(gate(rows)) * up(rows))
            out.index_add_(0, token, y.float() * topk_weights[token, choice, None].float())
        return out.to(x.dtype)
