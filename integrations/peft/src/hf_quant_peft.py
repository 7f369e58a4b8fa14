"""Adapters of PEFT on models of hf_quant: a start that makes up for rounding, and merging into a model quantized anew."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

import hf_quant

__all__ = ["merge_and_requantize", "start_from_error"]
TRIED = "0.21."
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
logger = logging.getLogger(__name__)
if not peft.__version__.startswith(TRIED):
    logger.warning("hf-quant-peft was tried with PEFT %sx, and this is %s", TRIED, peft.__version__)


@torch.no_grad()
def start_from_error(model: PeftModel, base: nn.Module, adapter: str = "default") -> dict[str, float]:
    """Let fresh LoRA adapters begin with the part of the rounding error that their rank can hold.

    The start of LoftQ (arXiv:2310.08659), with the codes as they are: the truncated SVD of ``W - dequantized``, shared out
    evenly between both factors. PEFT's own ``init_lora_weights="loftq"`` knows the grid of NF4 only.

    Args:
        model: A quantized model with LoRA adapters, as ``peft.get_peft_model`` makes it.
        base: The same model in floating point.
        adapter: Name of the adapter.

    Returns:
        By layer, the share of the rounding error that is left, in Frobenius norms.

    Raises:
        ValueError: The model has no LoRA adapter of that name, or one on embeddings.
    """
    left = {}
    whole: Any = model.base_model.model
    for name, layer in whole.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.r:
            continue
        if adapter not in layer.lora_A:
            raise ValueError(
                f"{name}: an adapter of embeddings; the start is that of linear layers and stacks of experts"
            )
        parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        path = name.replace(".base_layer", "")
        left[f"{path}.{parameter}"] = _start(layer, base.get_submodule(path), parameter, adapter)
    if not left:
        raise ValueError(f"no LoRA adapter {adapter!r}: peft.get_peft_model(model, LoraConfig(...)) adds one")
    return left


def _start(layer: Any, base: nn.Module, parameter: str, adapter: str) -> float:
    """Set the factors of one layer; gives the share of the error that is left."""
    exact, rounded = (_matrix(getattr(module, parameter), base) for module in (base, layer.get_base_layer()))
    error = exact - rounded
    down, up = _factors(error, layer.r[adapter])
    scaling = layer.scaling[adapter]
    if error.ndim == 3:  # PEFT has the number of the expert first among the rows of A, and last among the columns of B
        a, b = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
    else:
        a, b = down, up
    spare = ~a.any(1, keepdim=True)  # with zeros in both factors they could never learn: they stay as PEFT drew them
    layer.lora_A[adapter].weight.copy_(torch.where(spare, layer.lora_A[adapter].weight, a / scaling**0.5))
    layer.lora_B[adapter].weight.copy_(b / scaling**0.5)
    if adapter in layer.lora_magnitude_vector:  # DoRA's norms are those of the weight with its adapter
        layer.lora_magnitude_vector[adapter].weight.copy_((rounded + up @ down).norm(dim=-1))
    return float((error - up @ down).norm() / error.norm().clamp_min(1e-30))


def _matrix(weight: Tensor, owner: nn.Module) -> Tensor:
    """A weight or a stack of them as ``[..., N, K]``, whichever way its owner has it."""
    dense = weight.detach() * 1.0  # codes, seen as a weight, become a tensor
    turned = isinstance(owner, Conv1D) or getattr(owner, "is_transposed", False)
    return (dense.transpose(-1, -2) if turned else dense).float()


def _factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best ``[..., rank, K]`` and ``[..., N, rank]`` whose product is near ``error`` ``[..., N, K]``."""
    left, values, right = torch.linalg.svd(error, full_matrices=False)
    root = values[..., :rank].sqrt()
    down, up = root[..., None] * right[..., :rank, :], left[..., :rank] * root[..., None, :]
    missing = rank - root.shape[-1]  # a rank above that of the matrix
    return nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))


def merge_and_requantize(quantized: str | Path, adapters: str | Path, config: hf_quant.HfQuantConfig) -> Any:
    """Merge saved adapters in floating point and quantize the result, as the model itself was or otherwise.

    `hf_quant.merge_adapters` keeps the grid, on which small changes round away. Here every scale is chosen anew, and a
    calibrated method makes up for what a layer loses.

    Args:
        quantized: Folder of the quantized model.
        adapters: Folder that ``PeftModel.save_pretrained`` wrote.
        config: How to quantize: ``scheme``, ``method``, ``calibration`` (the text of the training suits), ...

    Returns:
        The model, to be saved by ``save_pretrained``.

    Raises:
        ValueError: ``adapters`` holds none, or those of another model.
        HfQuantError: As of ``from_pretrained`` with ``config``.
    """
    lora = peft.PeftConfig.from_pretrained(str(adapters))  # before anything is loaded
    with tempfile.TemporaryDirectory() as merged:
        model = hf_quant.load(str(quantized), dtype=torch.float32).dequantize()
        _adapted(model, str(adapters), lora).merge_and_unload().save_pretrained(merged)
        if any((Path(quantized) / name).is_file() for name in TOKENIZER_FILES):  # calibrated methods read a text
            AutoTokenizer.from_pretrained(quantized).save_pretrained(merged)
        return hf_quant.load(merged, dtype=torch.bfloat16, quantization_config=config)


def _adapted(model: Any, adapters: str, lora: peft.PeftConfig) -> Any:
    """A float model with saved adapters; PEFT saves beside those of embeddings the table itself, which is one of codes here."""
    adapted = peft.get_peft_model(model, lora)
    saved = peft.load_peft_weights(adapters)
    kept = {name: tensor for name, tensor in saved.items() if not name.rpartition(".")[0].endswith(".base_layer")}
    found: Any = peft.set_peft_model_state_dict(adapted, kept)
    wrong = [*found.unexpected_keys, *(name for name in found.missing_keys if "lora_" in name)]
    if wrong:
        raise ValueError(f"{adapters}: its adapters are not those of this model, for example {wrong[0]}")
    return adapted
