"""Modules whose float weights are rounded in the forward pass: what `QuantLinear` and `QuantEmbedding` are while they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_quant.core.geometry import PLAIN, Geometry
from hf_quant.core.numerics import floored, padded
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import PlanError
from hf_quant.training.fake_quantize import codes, fake_quant_linear, fake_quantize, grid, round_rows

if TYPE_CHECKING:
    from typing_extensions import Self

MASTER = torch.float32  # of everything that is trained
SUFFIXES = ("", "_scale", "_offset")  # of the parameters of one weight


def why_not(scheme: QuantScheme) -> str | None:
    """Why a scheme cannot be trained, in words; None if it can."""
    if scheme.foreign:
        return scheme.foreign
    if scheme.blocks:
        return (
            f"the whole numbers of its scales cannot be trained; {QuantScheme(scheme.bits, 32, scheme.symmetric)} can"
        )
    if scheme.outliers:
        return f"weights kept in floating point beside the codes cannot be trained; {_simpler(scheme)} can"
    if scheme.activations not in (None, "token"):
        return f"fixed scales and thresholds of activations cannot be trained; {_simpler(scheme)} can"
    return None


def _simpler(scheme: QuantScheme) -> QuantScheme:
    """What can be trained in its place."""
    return replace(scheme, outliers=0.0, outlier_columns=False, activations=scheme.activations and "token")


class FakeQuant(nn.Module):
    """A module that trains one float weight ``NAME [..., N, K]``, ``NAME_scale`` and ``NAME_offset`` ``[..., N, G]``.

    All three stay in float32 whatever the model is cast to: an update is often smaller than what a shorter type can hold.

    Attributes:
        compute_dtype: What the module computes in, and what scales are rounded to, since they will be stored in it.
        wide: Whether it computes in float32 in its place (`compute_wide`).
    """

    compute_dtype: torch.dtype
    wide: bool = False

    def trained(self) -> dict[str, QuantScheme]:
        """Scheme of each weight, by the name of its parameter."""
        raise NotImplementedError

    def quantized(self, name: str, values: dict[str, Tensor] | None = None) -> QuantizedTensor:
        """The codes of a weight, as they are stored.

        Args:
            name: Of its parameter.
            values: The parameters by their suffixes (`SUFFIXES`), where they are not the module's own: gathered from several processes.
        """
        values = self.values(name) if values is None else values
        scheme, weight, scale, offset = self.trained()[name], values[""], values["_scale"], values.get("_offset")
        integers = codes(padded(self._by_rows(weight), scheme), scale, offset, scheme.bits, self.compute_dtype)
        _, zero = grid(scale, offset, scheme.bits, self.compute_dtype)
        stored = floored(scale, self.compute_dtype).to(self.compute_dtype)
        return QuantizedTensor.from_codes(integers, stored, zero.squeeze(-1), scheme)

    def values(self, name: str) -> dict[str, Tensor]:
        """The values of a weight's parameters, by their suffixes."""
        return {suffix: parameter.detach() for suffix, parameter in self.parameters_of(name).items()}

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of a weight, by their suffixes."""
        parameters = {suffix: self._parameters.get(name + suffix) for suffix in SUFFIXES}
        return {suffix: parameter for suffix, parameter in parameters.items() if parameter is not None}

    def _by_rows(self, weight: Tensor) -> Tensor:
        """``[..., N, K]`` of a parameter that is shaped as the model's own class has it."""
        return weight

    @torch.no_grad()
    def begin(self, name: str, weight: Tensor, start: QuantizedTensor) -> None:
        """Let a weight begin as ``weight``, on the grid of a quantized one."""
        for suffix, values in _on_grid(weight, start).items():
            self.parameters_of(name)[suffix].copy_(values)

    def _register(self, name: str, weight: Tensor, start: QuantizedTensor) -> None:
        """Parameters that begin as ``weight``, on the grid of a quantized one."""
        values = _on_grid(weight, start)
        for suffix in SUFFIXES:
            self.register_parameter(name + suffix, nn.Parameter(values[suffix]) if suffix in values else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        parameters = [parameter for name in self.trained() for parameter in self.parameters_of(name).values()]
        kept = [(parameter, parameter.data) for parameter in parameters]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=kept[0][1].device)).dtype
        for parameter, data in kept:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        return self


def _on_grid(weight: Tensor, start: QuantizedTensor) -> dict[str, Tensor]:
    """The values of a weight's parameters, by their suffixes."""
    scale = start.scale.to(MASTER)
    values = {"": weight.to(MASTER), "_scale": scale}
    return values if start.zero_point is None else values | {"_offset": start.zero_point.to(MASTER) * scale}


class FakeQuantMatrix(FakeQuant):
    """In place of a layer that multiplies the rows of its input by one matrix ``[N, K]``.

    Args:
        weight: As the module that it takes the place of has it.
        start: The weight quantized, from which scales and zero points begin.
        bias: Of that module.
        dtype: What it computes in.
        geometry: Of that module.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_offset: nn.Parameter | None
    bias: Any  # a parameter or None; nn.Linear says otherwise

    def __init__(
        self, weight: Tensor, start: QuantizedTensor, *, bias: nn.Parameter | None, dtype: torch.dtype,
        geometry: Geometry = PLAIN,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.scheme, self.geometry, self.compute_dtype = start.scheme, geometry, dtype
        self.out_features, self.in_features = geometry.matrix(weight).shape
        self._register("weight", weight, start)
        self.register_parameter("bias", bias)

    def trained(self) -> dict[str, QuantScheme]:
        return {"weight": self.scheme}

    def _by_rows(self, weight: Tensor) -> Tensor:
        return self.geometry.matrix(weight)

    def forward(self, x: Tensor) -> Tensor:
        refuse_cast(self.weight)
        x = seen(self._narrow(self.geometry.rows(x)), self.scheme)
        x, weight = (padded(part, self.scheme) for part in (x, self._by_rows(self.weight)))
        y = fake_quant_linear(x, weight, self.weight_scale, self.weight_offset, self.scheme, self.compute_dtype)
        return self.geometry.output(y if self.bias is None else y + self.bias.to(y.dtype))

    def _narrow(self, x: Tensor) -> Tensor:
        """The input in the dtype of the model, where that has cast it to the dtype of the weight, which is float32 only here."""
        cast = x.dtype == MASTER and not self.wide and not torch.is_autocast_enabled(x.device.type)
        return x.to(self.compute_dtype) if cast else x

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}, bias={self.bias is not None}"


class FakeQuantLinear(FakeQuantMatrix, nn.Linear):  # type: ignore[misc]  # parameters are tensors there
    """In place of ``nn.Linear(in_features, out_features)``, and of GPT-2's ``Conv1D``, whose weight is ``[K, N]``."""


class FakeQuantPatches(FakeQuantMatrix):
    """In place of a convolution that is a linear map of each patch; no ``nn.Linear``, as which PEFT would treat it."""


class FakeQuantEmbedding(FakeQuant, nn.Embedding):
    """In place of ``nn.Embedding(V, K)``: only the rows looked up are rounded.

    Args:
        weight: ``[V, K]``.
        start: The weight quantized, from which scales and zero points begin.
        padding_idx: Row that gets no gradient.
        dtype: Of the rows returned.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_offset: nn.Parameter | None

    def __init__(self, weight: Tensor, start: QuantizedTensor, *, padding_idx: int | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.scheme, self.compute_dtype = padding_idx, start.scheme, dtype
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._register("weight", weight, start)

    def trained(self) -> dict[str, QuantScheme]:
        return {"weight": self.scheme}

    def forward(self, ids: Tensor) -> Tensor:
        refuse_cast(self.weight)
        weight, scale = padded(self._rows(ids, self.weight), self.scheme), self._rows(ids, self.weight_scale)
        offset = None if self.weight_offset is None else self._rows(ids, self.weight_offset)
        dtype = MASTER if self.wide else self.compute_dtype
        rows = fake_quantize(weight, scale, offset, self.scheme, self.compute_dtype, dtype)
        return rows[..., : self.embedding_dim]

    def _rows(self, ids: Tensor, table: Tensor) -> Tensor:
        return nn.functional.embedding(ids, table, self.padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}"


def compute_wide(model: nn.Module) -> None:
    """Let a model that is trained compute in float32. Scales are rounded to the dtype that they will be stored in all the same."""
    for module in model.modules():
        if isinstance(module, FakeQuant):
            module.wide = True
    for parameter in model.parameters():
        if parameter.dtype.itemsize < MASTER.itemsize:
            parameter.data = parameter.data.to(MASTER)


def refuse_cast(weight: Tensor) -> None:
    """Refuse a float weight that something has rounded: other codes would be trained than those that are saved.

    Raises:
        PlanError: It is not in float32.
    """
    if weight.dtype != MASTER:
        raise PlanError(
            f"training: the float weights must stay in float32 and are {weight.dtype}: leave param_dtype of FSDP's mixed precision "
            "out, and use autocast (bf16=True) to compute in less"
        )


def seen(x: Tensor, scheme: QuantScheme) -> Tensor:
    """What a layer multiplies: ``x`` in the dtype of autocast, rounded to INT8 where the scheme says so."""
    if scheme.activations is not None:
        x = round_rows(x)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x
