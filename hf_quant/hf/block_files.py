"""One finished block on disk: its codes in the format of the plan, and every other parameter as it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from hf_quant.core.layout import part_name
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.formats import Format
from hf_quant.hf.checkpoint_tensors import Tensors
from hf_quant.nn.experts import stacks
from hf_quant.solve.block import Block, use


def part_of(block: Block, codes: Mapping[str, QuantizedTensor], fmt: Format, source: Tensors) -> dict[str, Tensor]:
    """The tensors of a finished block, in main memory, by the names they have in the checkpoint.

    Args:
        block: Quantized; transforms may have changed its other parameters too.
        codes: Of each of its layers, by full name.
        fmt: How they are written.
        source: The float model's tensors: what else belongs to the block, and what floats are stored in.
    """
    tensors = {
        _stored_name(block, layer, local): tensor
        for layer, quantized in codes.items()
        for local, tensor in fmt.write(quantized).items()
    }
    coded = {*codes, *(f"{layer}.weight" for layer in codes)}
    for name, parameter in block.module.named_parameters(prefix=block.name):
        if name not in coded:
            tensors[name] = parameter.to(source.dtype(name))
    tensors |= {name: tensor for name, tensor in source.unused(f"{block.name}.") if name not in tensors}
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def take_part(block: Block, file: Path, fmt: Format) -> None:
    """Let a float block compute with what `part_of` made of it.

    Args:
        block: In floating point; changed in place.
        file: Holds the tensors.
        fmt: How codes are written.
    """
    tensors, codes = load_file(file), {}
    for layer, scheme in block.layers.items():
        names = {local: _stored_name(block, layer, local) for local in fmt.suffixes}
        codes[layer] = fmt.read({local: tensors[name] for local, name in names.items() if name in tensors}, scheme)
    coded = {*codes, *(f"{layer}.weight" for layer in codes)}
    for name, parameter in block.module.named_parameters(prefix=block.name):
        if name not in coded:
            parameter.data.copy_(tensors[name])
    use(block, codes)


def _stored_name(block: Block, layer: str, local: str) -> str:
    """Of one tensor of a layer, whose format calls it ``local``; stacks of experts are parameters, not modules."""
    path, _, leaf = block.local(layer).rpartition(".")
    stacked = leaf in stacks(block.module.get_submodule(path))
    return part_name(layer, local) if stacked else f"{layer}.{local}"
