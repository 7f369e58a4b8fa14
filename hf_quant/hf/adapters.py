"""PEFT's adapters and codes: merging the first into the second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.private_torch import wrapper_subclass
from hf_quant.errors import PlanError
from hf_quant.nn import QuantEmbedding, QuantExperts, QuantLinear
from hf_quant.nn._requantizing import requantize

Quantized = QuantLinear | QuantEmbedding | QuantExperts


def merge_adapters(model: Any) -> tuple[Any, dict[str, float]]:
    """Merge adapters into the codes of a quantized model, on the grids that it has.

    Scales, zero points and the positions of outliers stay, and every weight gets the code nearest to what the adapters make
    of it: a change of less than half a step is lost. To lose nothing, merge into ``model.dequantize()``.

    Args:
        model: As ``peft.get_peft_model`` makes it, its adapters trained.

    Returns:
        The model without adapters; and, by the name of a layer or stack of experts, the share of the adapters' change that
        rounding lost, ``|codes - merged| / |merged - codes before|`` in Frobenius norms.

    Raises:
        PlanError: There are no adapters; or one belongs to a table that is both the embeddings and the output head, be it of codes
            or not.
    """
    if not hasattr(model, "merge_and_unload"):
        raise PlanError("merge_adapters: the model has no adapters; peft.get_peft_model(model, config) adds some")
    if wrapper_subclass is None:
        raise PlanError("merge_adapters: this torch shows codes as copies only; merge into model.dequantize()")
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}
    _refuse_shared(quantized)
    _refuse_tied(model)
    biases = [
        (bias, bias.dtype) for m in quantized.values() if isinstance(bias := getattr(m, "bias", None), torch.Tensor)
    ]
    with torch.no_grad(), _rewriting(quantized) as lost:
        merged = model.merge_and_unload(safe_merge=True)
    for bias, dtype in biases:
        bias.data = bias.data.to(dtype)
    return merged, lost


@contextmanager
def _rewriting(quantized: dict[str, Quantized]) -> Iterator[dict[str, float]]:
    """Let the weights of quantized modules be set; gives what each setting lost."""
    names, lost = {module: _plain(name) for name, module in quantized.items()}, {}

    def rewriting(module: Quantized) -> Any:
        def rewrite(parameter: str, weight: Tensor) -> None:
            before = module.float_weight(parameter, torch.float32)
            requantize(module, parameter, weight)
            change, error = (w - weight for w in (before, module.float_weight(parameter, torch.float32)))
            full = names[module] if parameter == "weight" else f"{names[module]}.{parameter}"
            lost[full] = float(error.norm() / change.norm()) if bool(change.any()) else 0.0

        return rewrite

    turned = [module for module in names if getattr(module, "conv1d", False)]
    try:
        for module in names:
            module.rewrite = rewriting(module)
        for module in turned:
            module.conv1d = False  # PEFT takes it for the nn.Linear that it is
        yield lost
    finally:
        for module in names:
            module.rewrite = None
        for module in turned:
            module.conv1d = True


def _plain(name: str) -> str:
    """The name of a module without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _refuse_tied(model: Any) -> None:
    """Refuse an adapter of one of two modules that share a parameter: what is merged into it would change both."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        adapted = next((name for name in names if name.endswith(".base_layer")), None)
        if adapted is not None and len(names) > 1:
            other = next(name for name in names if name != adapted)
            raise PlanError(
                f"{_plain(adapted)}: {_plain(other)} has the same weight, which the adapter would change as well: save the adapter and "
                "load it beside the model, or train without one here"
            )


def _refuse_shared(quantized: dict[str, Quantized]) -> None:
    shared = any(getattr(module, "shares_codes", False) for module in quantized.values())
    for name, module in quantized.items():
        adapted = name.endswith(".base_layer")
        if adapted and (getattr(module, "shares_codes", False) or (shared and isinstance(module, QuantEmbedding))):
            raise PlanError(
                f"{_plain(name)}: its codes are the embeddings and the output head at once, and the adapter belongs to one of "
                "them; merge into model.dequantize()"
            )
