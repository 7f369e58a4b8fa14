"""A linear layer with a quantized weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_quant.core.geometry import PLAIN, TRANSPOSED, Geometry
from hf_quant.core.layout import in_features, wrong_shape, wrong_values
from hf_quant.core.pieces import below, columns_of, rows_of, why_not_below
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import CheckpointError, PlanError
from hf_quant.methods import method as method_named
from hf_quant.methods import quantize
from hf_quant.nn._weight import frozen
from hf_quant.nn.matrix import QuantMatrix


class QuantLinear(QuantMatrix, nn.Linear):
    """Drop-in for ``nn.Linear(in_features, out_features)``; a subclass, so that PEFT trains adapters on top of it.

    Args:
        in_features: K, which the padding of the scheme makes a multiple of 32.
        out_features: N.
        scheme: The quantization of the weight, or its slug.
        bias: Whether the layer has a bias.
        dtype: In which the layer computes; also that of the bias.
        scale_dtype: The dtype of scales; None for ``dtype``.
        quantized: Whether ``weight`` holds codes, or a float placeholder that loading quantizes.
        conv1d: Whether it replaces GPT-2's ``Conv1D``, whose float weight is ``[K, N]``.
    """

    def __init__(
        self, in_features: int, out_features: int, scheme: QuantScheme | str, *, bias: bool, dtype: torch.dtype,
        scale_dtype: torch.dtype | None = None, quantized: bool = True, conv1d: bool = False,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.conv1d = conv1d
        self._build(
            (out_features, in_features), _known(scheme), bias=bias, dtype=dtype, scale_dtype=scale_dtype, quantized=quantized
        )  # fmt: skip

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        """That of a linear layer, or of a ``Conv1D``."""
        return TRANSPOSED if self.conv1d else PLAIN

    def float_shape(self, name: str) -> tuple[int, ...] | None:
        if name != "weight":
            return None
        n, k = self.out_features, self.in_features
        return (k, n) if self.conv1d else (n, k)

    @classmethod
    def of(cls, weight: QuantizedTensor, dtype: torch.dtype | None = None) -> QuantLinear:
        """The layer of a weight ``[N, K]``, without a bias, ready to run.

        Args:
            weight: Quantized.
            dtype: In which the layer computes; None for that of its scales.
        """
        n, k = weight.qweight.shape[0], weight.in_features
        layer = cls(k, n, weight.scheme, bias=False, dtype=dtype or weight.scale.dtype, scale_dtype=weight.scale.dtype)
        for name, tensor in weight.parts().items():
            layer._parameters[name] = frozen(tensor)
        layer.choose_kernel()
        layer.finished()
        return layer

    @classmethod
    def from_weight(
        cls, weight: Tensor, scheme: QuantScheme | str, dtype: torch.dtype | None = None, *, method: str = "rtn"
    ) -> QuantLinear:
        """The layer of a float weight, without a bias, ready to run.

        Args:
            weight: ``[N, K]``.
            scheme: Of the weight, or its slug; with a smaller group size where its own does not divide K, and padded where 32 does
                not.
            dtype: In which the layer computes; None for that of the weight.
            method: How codes are chosen, without looking at inputs: ``"rtn"`` or ``"hqq"``.

        Raises:
            SchemeError: The scheme does not fit the weight.
            PlanError: There is no such method, or it looks at inputs.
        """
        known = _known(scheme).fitted(weight.shape[1])
        solver = method_named(method)
        if solver.calibrated or known.needs_ranges:
            raise PlanError(f"{method}, {known}: a layer by itself has no inputs to look at; rtn and hqq need none")
        return cls.of(quantize(solver, weight, known, weight.dtype), dtype or weight.dtype)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: QuantScheme | str, dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """The layer of the tensors that a native checkpoint has for it, without a bias, ready to run.

        Args:
            tensors: By the end of their names: ``weight`` (codes), ``weight_scale``, ... as in `core.layout`.
            scheme: Of the weight, or its slug.
            dtype: In which the layer computes; None for that of its scales.

        Raises:
            CheckpointError: The tensors contradict the scheme, or hold values that no kernel may meet.
        """
        known = _known(scheme)
        wrong = wrong_shape(tensors, known) or wrong_values(tensors, known, in_features(tensors["weight"], known))
        if wrong is not None:
            raise CheckpointError(wrong)
        return cls.of(QuantizedTensor.from_parts(tensors, known), dtype)

    def narrowed(self, axis: int, start: int, count: int) -> QuantLinear:
        """A layer with a part of this one, as tensor parallelism gives it to one of several devices.

        Args:
            axis: 0 for outputs (rows of the weight), 1 for inputs (its columns).
            start: The first of them.
            count: How many.

        Raises:
            SchemeError: There are no such rows or columns, or they cut a group of columns.
        """
        weight = self.quantized_weight()
        part = (rows_of, columns_of)[axis](weight, start, count)
        return type(self).of(part, self.compute_dtype)

    @classmethod
    def joined(cls, layers: Sequence[QuantLinear]) -> QuantLinear | None:
        """One layer whose outputs are those of all ``layers``, one after the other; None where their weights do not fit together."""
        weights = [layer.quantized_weight() for layer in layers]
        return None if why_not_below(weights) is not None else cls.of(below(weights), layers[0].compute_dtype)

    def extra_repr(self) -> str:
        bits = self.scheme.bits_per_weight(self.in_features, 8 * self.weight_scale.element_size())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, bits_per_weight={bits:.4g}"
        )


def _known(scheme: QuantScheme | str) -> QuantScheme:
    return QuantScheme.parse(scheme) if isinstance(scheme, str) else scheme
