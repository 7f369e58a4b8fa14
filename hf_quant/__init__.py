"""Group-wise INT8/4/3/2 quantization for transformers models: quantize, measure, save, load."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_quant.hf import HfQuantConfig as HfQuantConfig
    from hf_quant.hf import QuantCache as QuantCache
    from hf_quant.hf import load as load
    from hf_quant.hf import merge_adapters as merge_adapters
    from hf_quant.hf import prepare_for_training as prepare_for_training
    from hf_quant.hf import take_over as take_over

__version__ = "0.1.0"
__all__ = ["HfQuantConfig", "QuantCache", "load", "merge_adapters", "prepare_for_training", "take_over"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something of theirs is asked for."""
    if name in __all__:
        return getattr(import_module("hf_quant.hf"), name)
    raise AttributeError(f"module 'hf_quant' has no attribute {name!r}")
