"""What happens to a tensor between the checkpoint and the model: transformers calls these while it loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.formats import format_named
from hf_quant.methods import method
from hf_quant.nn import QuantExperts, QuantLinear
from hf_quant.nn._weight import frozen
from hf_quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from hf_quant.hf.quantizer import HfQuantQuantizer

_NATIVE = format_named("native")


class QuantizeOnLoad(ConversionOps):  # type: ignore[misc]
    """A float weight becomes codes, scales and zero points; one expert of a stack after the other."""

    def __init__(self, quantizer: HfQuantQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)  # so that the float tensor is gone before the next one comes
            made |= self._one(name, value[0] if isinstance(value, list) else value, model)
        return made

    def _one(self, name: str, value: Tensor, model: Any) -> dict[str, Tensor]:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        try:
            if self.quantizer.failure is not None:
                raise self.quantizer.failure
            parts = self._quantized(name, leaf, value, module)
        except HfQuantError as error:  # raised again after loading: from here transformers would only log it
            self.quantizer.failure = error
            return {name: frozen(value.new_empty(0))}
        return {name + local.removeprefix("weight"): frozen(part) for local, part in parts.items()}

    def _quantized(self, name: str, leaf: str, value: Tensor, module: Any) -> dict[str, Tensor]:
        expected = getattr(module, leaf).shape
        if value.shape != expected:
            raise CheckpointError(f"tensor {name} has shape {list(value.shape)}, config.json says {list(expected)}")
        dtype = getattr(module, leaf).dtype
        if isinstance(module, QuantExperts):
            turned = module.is_transposed
            return _stacked(
                [self._matrix(name, e.T if turned else e, module.schemes[leaf], dtype) for e in value.unbind()]
            )
        turned = isinstance(module, QuantLinear) and module.conv1d
        return self._matrix(name, value.T if turned else value, module.scheme, dtype)

    def _matrix(self, name: str, weight: Tensor, scheme: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        bad = weight.numel() - int(weight.isfinite().sum())
        if bad:
            raise CheckpointError(f"tensor {name}: {bad} values are NaN or infinite")
        solver = method(self.quantizer.quantization_config.method)
        return _NATIVE.write(solver.quantize(weight, scheme, dtype))

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("rounding cannot be undone")


def _stacked(experts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {local: torch.stack([parts[local] for parts in experts]) for local in experts[0]}


class ReadCompressed(ConversionOps):  # type: ignore[misc]
    """The tensors of one compressed-tensors layer become those of a `QuantLinear`, bit for bit."""

    def __init__(self, quantizer: HfQuantQuantizer) -> None:
        self.hf_quantizer = quantizer  # by this name transformers knows to hand the tensors over in their own dtype
        self.format = format_named("compressed_tensors")

    @classmethod
    def converter(cls, quantizer: HfQuantQuantizer) -> WeightConverter:
        """For every layer that has such tensors."""
        op = cls(quantizer)
        return WeightConverter(list(op.format.suffixes), "weight", [op])

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Tensor]:
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        tensors = {n: v[0] if isinstance(v, list) else v for n, v in input_dict.items()}
        try:
            read = self.format.read(tensors, module.scheme)
        except HfQuantError as error:
            self.hf_quantizer.failure = type(error)(f"{full_layer_name}: {error}")
            raise
        typed = QuantizedTensor(read.qweight, read.scale.to(module.compute_dtype), read.zero_point, read.scheme)
        written = _NATIVE.write(typed)
        return {full_layer_name + local.removeprefix("weight"): frozen(t) for local, t in written.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("saving writes this format itself")
