"""Functions of upper floors that lower ones call. The package face fills them in, so that no floor imports upwards.

Each imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

push_model: Callable[..., str]  # `hf_quant.publish.push.push_model`, which ``model.push_to_hub`` calls
transformers_plugin: Callable[[], ModuleType | Any]  # imports `hf_quant.hf`, once transformers asks for a class of it
rounding: Callable[
    [], ModuleType | Any
]  # imports `hf_quant.kernels._native.rounding`, which `hf_quant.core.rounding` asks
compiled: Callable[
    [], ModuleType | Any
]  # imports `hf_quant.kernels._native.compiled`, which `hf_quant.core.pages` asks
words: Callable[[], ModuleType | Any]  # imports `hf_quant.kernels._native.words`, which `hf_quant.core.words` asks
