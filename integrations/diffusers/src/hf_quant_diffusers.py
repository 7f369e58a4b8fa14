"""hf-quant in diffusers: importing this module registers the configuration and the quantizer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

import diffusers
import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

import hf_quant

__all__ = ["HfQuantDiffusersConfig"]
TRIED = "0.42."
logger = logging.getLogger(__name__)
if not diffusers.__version__.startswith(TRIED):
    logger.warning("hf-quant-diffusers was tried with diffusers %sx, and this is %s", TRIED, diffusers.__version__)


class Method(str, Enum):
    """Diffusers asks for the ``value`` of a method."""

    HF_QUANT = "hf_quant"


class HfQuantDiffusersConfig(QuantizationConfigMixin):
    """How to quantize the linear layers of a model of diffusers, and after that how they were.

    Args:
        scheme: Slug of every layer not named below, for example ``"W4A16-g64-asym"``.
        method: ``"rtn"`` or ``"hqq"``, which look at no inputs.
        overrides: Glob over module names to slug, or to None for layers that stay in floating point; the first match wins.
        modules_to_not_convert: Globs of layers that stay in floating point.
        quant_method: Always ``"hf_quant"``.

    Raises:
        HfQuantError: A scheme or method is impossible, or looks at inputs.
    """

    def __init__(
        self, scheme: str = "W4A16-g128", method: str = "rtn", overrides: Mapping[str, str | None] | None = None,
        modules_to_not_convert: list[str] | None = None, quant_method: str = "hf_quant",
    ) -> None:  # fmt: skip
        checked = hf_quant.HfQuantConfig(scheme, method=method, overrides=overrides)
        if checked.calibrated:
            raise hf_quant.HfQuantError(
                f"method {method!r} looks at inputs, which diffusers has none of: 'rtn' or 'hqq'"
            )
        self.scheme, self.method, self.overrides = scheme, method, dict(overrides or {})
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.quant_method = Method.HF_QUANT

    def to_diff_dict(self) -> dict[str, Any]:
        """What is shown of it."""
        return self.to_dict()

    def scheme_of(self, name: str) -> str | None:
        """The slug of a layer, None in floating point."""
        if any(fnmatchcase(name, glob) for glob in self.modules_to_not_convert):
            return None
        named = next((glob for glob in self.overrides if fnmatchcase(name, glob)), None)
        return self.scheme if named is None else self.overrides[named]

    def unmatched(self, names: Collection[str]) -> list[str]:
        """Globs that match none of these layers; no error, since one configuration may be that of several models of a pipeline."""
        return [
            glob
            for glob in (*self.overrides, *self.modules_to_not_convert)
            if not any(fnmatchcase(n, glob) for n in names)
        ]


class HfQuantDiffusersQuantizer(DiffusersQuantizer):
    """Quantizes a float model while diffusers loads it, or loads a quantized one."""

    quantization_config: HfQuantDiffusersConfig
    dtype = torch.float32  # unless another is asked for

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        self.dtype = torch_dtype or self.dtype
        return torch_dtype

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        # a row that fills no words stays in floating point; a saved config names such layers
        fits = {name for name, module in linear.items() if module.in_features % 32 == 0}
        config.modules_to_not_convert = sorted({*config.modules_to_not_convert, *(linear.keys() - fits)})
        self.schemes = {name: slug for name in fits if (slug := config.scheme_of(name)) is not None}
        for glob in config.unmatched(linear):
            logger.warning("hf-quant-diffusers: %r matches no linear layer of %s", glob, type(model).__name__)
        if not self.schemes:
            raise hf_quant.HfQuantError(f"nothing to quantize in {type(model).__name__}: no linear layer is left")
        if not self.pre_quantized:
            return
        for name, slug in self.schemes.items():
            old = linear[name]
            with torch.device("meta"):
                new = hf_quant.QuantLinear(
                    old.in_features, old.out_features, slug, bias=old.bias is not None, dtype=self.dtype
                )
            model.set_submodule(name, new)

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        path, _sep, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and path in self.schemes

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, state_dict: Any = None,
        unexpected_keys: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        path = param_name.rpartition(".")[0]
        old, weight = model.get_submodule(path), param_value.to(target_device)
        new = hf_quant.QuantLinear.from_weight(weight, self.schemes[path], method=self.quantization_config.method)
        new.bias = old.bias  # loaded before or after the weight
        self.quantization_config.overrides[path] = str(new.scheme)  # its groups may be smaller than asked for
        model.set_submodule(path, new)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, hf_quant.QuantLinear):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
                module.choose_kernel()
                module.finished()
        return model

    def _dequantize(self, model: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, hf_quant.QuantLinear):
                dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                dense.weight, dense.bias = nn.Parameter(module.dequantize(), requires_grad=False), module.bias
                model.set_submodule(name, dense)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING["hf_quant"] = HfQuantDiffusersConfig
AUTO_QUANTIZER_MAPPING["hf_quant"] = HfQuantDiffusersQuantizer
