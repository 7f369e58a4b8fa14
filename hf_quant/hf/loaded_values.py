"""Checks of the values in a model, after transformers has loaded it and before a kernel reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_quant.core.layout import PARTS, WEIGHT, in_features, part_name, wrong_values
from hf_quant.errors import CheckpointError
from hf_quant.hf._hooks import may_be_missing, stays_in_float32
from hf_quant.hf.community import Placed, new_head
from hf_quant.kernels._native.finite import all_finite
from hf_quant.nn import QuantExperts
from hf_quant.nn._hooks import is_initialized
from hf_quant.nn._outside import Outside


def check_complete_module(name: str, module: nn.Module) -> None:
    """Check that every parameter of a quantized module in memory was loaded from the checkpoint.

    Raises:
        CheckpointError: Names the first that was not.
    """
    for local, parameter in sorted(module.named_parameters(recurse=False)):  # a weight before its scale
        if parameter.device.type != "meta" and not is_initialized(parameter):
            raise CheckpointError(f"tensor {name}.{local} is missing from the checkpoint")


def check_codes(name: str, module: Any, placed: Placed, *, pre_quantized: bool) -> None:
    """Check the codes that a kernel will read; for parameters on disk, check that their file was examined.

    Args:
        name: Name of the module.
        module: Quantized.
        placed: The layers of the checkpoint.
        pre_quantized: Whether the codes come from a checkpoint.

    Raises:
        CheckpointError: Names the layer and its file.
    """
    schemes = module.schemes if isinstance(module, QuantExperts) else {WEIGHT: module.scheme}
    for codes, scheme in schemes.items():
        full = name if codes == WEIGHT else f"{name}.{codes}"
        parts = {part: getattr(module, part_name(codes, part), None) for part in PARTS}
        held = {part: tensor for part, tensor in parts.items() if tensor is not None}
        wrong: str | None = None
        if not any(tensor.device.type == "meta" for tensor in held.values()):
            wrong = wrong_values(held, scheme, in_features(held[WEIGHT], scheme))
        elif pre_quantized and full not in placed.schemes:
            wrong = "lies on disk and was not checked"
        if wrong is not None:
            raise CheckpointError(f"{placed.files.get(full, full)}: {wrong}")


def check_floats(model: Any, *, from_checkpoint: bool) -> None:
    """Check that every floating-point parameter in memory is finite and, if required, was loaded from the checkpoint.

    Args:
        model: Loaded.
        from_checkpoint: Whether parameters must be in the checkpoint, except those of a new head or that the model's class allows to be missing.

    Raises:
        CheckpointError: Names the first that fails.
    """
    required, head = from_checkpoint and not may_be_missing(model), new_head(model)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            continue
        repacked = 0 in parameter.shape
        if required and not repacked and name not in head and not is_initialized(parameter):
            raise CheckpointError(f"tensor {name} is missing from the checkpoint")
        if not parameter.is_floating_point():
            continue
        if not all_finite(parameter.detach()):
            raise CheckpointError(f"tensor {name}: {int((~parameter.isfinite()).sum())} values are NaN or infinite")


def keep_in_float32(model: Any) -> None:
    """Give floats that transformers loads in float32, such as T5's ``wo`` in a model in float16, that dtype before they are loaded.

    Those of quantized layers compute in the dtype of the model.
    """
    for path, module in model.named_modules():
        if isinstance(module, Outside):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if stays_in_float32(model, f"{path}.{leaf}", parameter.dtype):
                parameter.data = parameter.data.float()


def cast(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast floats to their expected dtype: before 5.21 transformers does not where it renames them."""
    for name, parameter in model.named_parameters():
        expected = dtypes.get(name, parameter.dtype)
        if parameter.device.type != "meta" and parameter.dtype != expected:
            parameter.data = parameter.data.to(expected)
