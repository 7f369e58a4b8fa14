"""Files of finished blocks: codes in the format of the plan, and all other parameters as stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hf_quant.core.layout import part_name
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.formats import Format
from hf_quant.hf.checkpoint_tensors import Tensors
from hf_quant.nn.experts import stacks
from hf_quant.solve.block import Block, inside, use


def part_of(block: Block, codes: Mapping[str, QuantizedTensor], fmt: Format, source: Tensors) -> dict[str, Tensor]:
    """The tensors of a finished block, in main memory, by their names in the checkpoint.

    Args:
        block: Quantized; transforms may have changed its other parameters too.
        codes: Codes of its layers, by full name.
        fmt: The format.
        source: Tensors of the float model: the other tensors of the block, and the dtypes that floats are stored in.
    """
    tensors = written(block.module, codes, fmt, block.name)
    coded = {*codes, *(f"{layer}.weight" for layer in codes)}
    for name, parameter in block.module.named_parameters(prefix=block.name):
        if name not in coded and source.holds(name):
            tensors[name] = parameter.to(source.dtype(name))
    tensors |= {name: tensor for name, tensor in source.unused(inside(block.name)) if name not in tensors}
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def written(model: Any, codes: Mapping[str, QuantizedTensor], fmt: Format, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of coded layers by their names in the checkpoint; ``model`` is the part of the model called ``prefix``."""
    return {
        _stored_name(model, prefix, layer, local): tensor
        for layer, quantized in codes.items()
        for local, tensor in fmt.write(quantized).items()
    }


def take_part(block: Block, file: Path, fmt: Format) -> None:
    """Load a file of `part_of` into a float block.

    Args:
        block: In floating point; changed in place.
        file: The file.
        fmt: Its format.
    """
    tensors, codes = load_file(file), {}
    for layer, scheme in block.layers.items():
        names = {local: _stored_name(block.module, block.name, layer, local) for local in fmt.suffixes}
        codes[layer] = fmt.read({local: tensors[name] for local, name in names.items() if name in tensors}, scheme)
    coded = {*codes, *(f"{layer}.weight" for layer in codes)}
    for name, parameter in block.module.named_parameters(prefix=block.name):
        if name not in coded:
            parameter.data.copy_(tensors[name])
    use(block, codes)


def _stored_name(model: Any, prefix: str, layer: str, local: str) -> str:
    """Full name of a tensor that the format calls ``local``; stacks of experts are parameters, not modules."""
    path, _, leaf = (layer.removeprefix(f"{prefix}.") if prefix else layer).rpartition(".")
    stacked = leaf in stacks(model.get_submodule(path))
    return part_name(layer, local) if stacked else f"{layer}.{local}"
