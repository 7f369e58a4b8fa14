"""Which layer of vLLM's model has which scheme."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

import hf_quant
from hf_quant_vllm.experts import ExpertsMethod
from hf_quant_vllm.linear import HeadMethod, LinearMethod

FIRST = ("gate_up_proj", "up_proj")  # names of the stack that multiplies the input of experts


class VllmConfig(QuantizationConfig):
    """``quantization_config`` of a native checkpoint, by the names of vLLM's layers.

    Args:
        stored: The configuration of the checkpoint.

    Raises:
        HfQuantError: The checkpoint holds what vLLM's layers cannot; says what to do.
    """

    def __init__(self, stored: hf_quant.HfQuantConfig) -> None:
        super().__init__()
        if stored.quantize_embeddings:
            raise hf_quant.HfQuantError(
                "the input embeddings are quantized, and vLLM looks them up in floating point: quantize without "
                "quantize_embeddings, and without quantize_lm_head where the model ties both"
            )
        self.stored, self.overrides = stored, dict(stored.overrides)
        self.left = list(stored.modules_to_not_convert)

    @classmethod
    def get_name(cls) -> Any:
        return "hf_quant"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        return cls(hf_quant.HfQuantConfig.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as vLLM does for this model."""
        self.overrides = hf_to_vllm_mapper.apply_dict(self.overrides)
        self.left = hf_to_vllm_mapper.apply_list(self.left)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            schemes = [self.scheme_of(name) for name in self._parts(prefix)]
            return LinearMethod(schemes, prefix) if any(schemes) else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            path = prefix.removesuffix(".routed_experts")
            first, second = self._of_stack(path, FIRST), self._of_stack(path, ("down_proj",))
            if first is None and second is None:
                return None
            if first is None or second is None:
                raise hf_quant.HfQuantError(f"{prefix}: one stack of its experts is quantized and the other is not")
            return ExpertsMethod(first, second, layer)
        scheme = self.scheme_of(prefix) if isinstance(layer, ParallelLMHead) else None
        return HeadMethod([scheme], prefix) if scheme is not None else None

    def _parts(self, prefix: str) -> Sequence[str]:
        """The layers of the checkpoint that one layer of vLLM is made of."""
        path, _, leaf = prefix.rpartition(".")
        return [f"{path}.{part}" if path else part for part in self.packed_modules_mapping.get(leaf, [leaf])]

    def scheme_of(self, name: str) -> str | None:
        """The slug of a layer's scheme, None in floating point."""
        if any(fnmatchcase(name, pattern) for pattern in self.left):
            return None
        named = next((glob for glob in self.overrides if fnmatchcase(name, glob)), None)
        return self.stored.scheme if named is None else self.overrides[named]

    def _of_stack(self, path: str, leaves: Sequence[str]) -> str | None:
        """The scheme of a stack of experts; transformers may call the layer above them by another name."""
        end = f"{path.split('.')[-3]}.*.experts"  # "0.*.experts" of "model.layers.0.mlp.experts"
        for leaf in leaves:
            if any(fnmatchcase(name, f"*.{end}.{leaf}") for name in self.left):
                return None
            for name, slug in self.overrides.items():
                if fnmatchcase(name, f"*.{end}.{leaf}"):
                    return slug
        return self.stored.scheme
