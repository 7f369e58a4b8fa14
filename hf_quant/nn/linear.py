"""A linear layer whose weight is codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.formats import format_named
from hf_quant.kernels import LinearBackend, LinearSpec, outlier_linear, select
from hf_quant.nn._weight import frozen, read, register
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import Outliers, QuantizedTensor

_NATIVE = format_named("native")


class QuantLinear(nn.Linear):
    """Drop-in for ``nn.Linear(in_features, out_features)``; a subclass, so that PEFT trains adapters on top of it.

    The parameters are those of `formats.native`. `choose_kernel`, called once after loading and after every move,
    may lay the codes out anew for its kernel; ``state_dict`` always gives the portable layout back.

    Args:
        in_features: K, a multiple of 32.
        out_features: N.
        scheme: How the weight is coded.
        bias: Whether there is one.
        dtype: What the layer computes in, and the dtype of the bias.
        scale_dtype: Of the scales; None for ``dtype``.
        quantized: Whether the weight starts as codes; if not, as the float placeholder that loading quantizes.
        conv1d: Whether this stands in for GPT-2's ``Conv1D``, whose float weight is ``[K, N]``.
    """

    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    weight_outlier_index: nn.Parameter
    weight_outlier_value: nn.Parameter
    weight_perm: nn.Parameter
    weight_input_scale: nn.Parameter

    def __init__(
        self, in_features: int, out_features: int, scheme: QuantScheme, *, bias: bool, dtype: torch.dtype,
        scale_dtype: torch.dtype | None = None, quantized: bool = True, conv1d: bool = False,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme, self.conv1d = in_features, out_features, scheme, conv1d
        self.compute_dtype = dtype  # PEFT gives its adapters this dtype
        if not quantized:
            shape = (in_features, out_features) if conv1d else (out_features, in_features)
            self.weight = frozen(torch.empty(shape, dtype=dtype))
        register(self, "weight", (out_features, in_features), scheme, scale_dtype or dtype, codes=quantized)
        self.register_parameter("bias", frozen(torch.empty(out_features, dtype=dtype)) if bias else None)
        self.keeps_layout = False  # True where hooks move the codes about (offloading)
        self.shares_codes = False  # True where the embeddings read the same codes
        self._backend: LinearBackend | None = None
        self._repacked: tuple[Tensor, ...] = ()
        self._is_hf_initialized = True  # or transformers would call normal_() on integer weights it finds missing

    @property
    def spec(self) -> LinearSpec:
        """What a kernel needs to know of this layer."""
        device = self.weight_scale.device.type
        return LinearSpec(self.scheme, self.out_features, self.in_features, self.compute_dtype, device)

    def quantized_weight(self) -> QuantizedTensor:
        """Codes, scales and zero points in the portable layout; a copy of the codes where a kernel repacked them."""
        if self._backend is None or not self._repacked or self.shares_codes:
            return read(self, "weight", self.scheme)
        qweight = self._backend.restore(self._repacked, self.spec)
        return read(self, "weight", self.scheme, qweight=qweight)

    def choose_kernel(self) -> None:
        """Choose the backend for where the parameters are now, and lay the codes out as it reads them."""
        self._unpack()
        if self.weight_scale.device.type == "meta":
            return
        self._backend = select(self.spec, repacking=not self.keeps_layout)
        if self._backend.repacks:
            self._repacked = self._backend.prepare(self.quantized_weight(), self.spec)
            if not self.shares_codes:
                self.weight = frozen(self.weight.new_empty(0))  # one copy of the codes in memory, not two

    def _unpack(self) -> None:
        if self._repacked and not self.shares_codes:
            self.weight = frozen(_NATIVE.write(self.quantized_weight())["weight"])
        self._backend, self._repacked = None, ()

    def forward(self, x: Tensor) -> Tensor:
        if self._backend is None:
            self._backend = select(self.spec, repacking=False)
        prepared = self._repacked or self._backend.prepare(read(self, "weight", self.scheme), self.spec)
        if self.scheme.permuted:
            x = x.index_select(-1, self.weight_perm[0])
        fused = getattr(self._backend, "fused", None)
        if fused is not None:
            own = Outliers(self.weight_outlier_index, self.weight_outlier_value) if self.scheme.outliers else None
            made: Tensor = fused(x, prepared, self.spec, self.bias, own)
            return made
        y = self._backend.linear(x, prepared, self.spec)
        if self.scheme.outliers:
            y = y + outlier_linear(x, self.weight_outlier_index, self.weight_outlier_value)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight ``[N, K]``."""
        return self.quantized_weight().dequantize(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        chosen = self._backend is not None
        self._unpack()
        cast = fn(self.weight_scale.new_empty(0, dtype=self.compute_dtype)).dtype
        finer = self.weight_scale.dtype != self.compute_dtype
        own = [(p, p.data) for name, p in self.named_parameters(recurse=False) if name.startswith("weight_") and finer]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = cast
        for parameter, tensor in own:  # scales finer than what the layer computes in stay so
            if parameter.dtype != tensor.dtype:
                parameter.data = tensor.to(parameter.device)
        if chosen:
            self.choose_kernel()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._repacked and not self.shares_codes:
            destination[prefix + "weight"] = _NATIVE.write(self.quantized_weight())["weight"]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        chosen = self._backend is not None
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)
        if chosen:  # PEFT loads adapters through here too
            self.choose_kernel()

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy`` and pickles: in the portable layout, since that of a kernel is for this processor only."""
        state = self.__dict__.copy()
        if self._repacked:
            state["_parameters"] = self._parameters.copy()
            state["_parameters"]["weight"] = frozen(_NATIVE.write(self.quantized_weight())["weight"])
            state["_backend"], state["_repacked"] = None, ()
        return state | {"_chosen": self._backend is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        chosen = state.pop("_chosen")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if chosen:
            self.choose_kernel()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, bias={self.bias is not None}"
