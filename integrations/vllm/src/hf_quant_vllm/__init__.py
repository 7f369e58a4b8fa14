"""A plug-in of vLLM for checkpoints with ``quant_method: "hf_quant"``: vLLM calls `register` in each of its processes."""

from __future__ import annotations

import logging

__all__ = ["register"]
TRIED = "0.32."
logger = logging.getLogger("vllm.hf_quant")


def register() -> None:
    """Tell vLLM of the format; may be called repeatedly."""
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config

    from hf_quant_vllm.config import VllmConfig

    if not vllm.__version__.startswith(TRIED):
        logger.warning("hf-quant-vllm was tried with vLLM %sx, and this is %s", TRIED, vllm.__version__)
    register_quantization_config("hf_quant")(VllmConfig)
