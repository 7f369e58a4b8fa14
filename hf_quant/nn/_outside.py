"""A float view of quantized weights for code outside of this package, which can be read but not written.

Models read ``module.weight.dtype`` to cast inputs, and some compute with ``module.weight`` directly. The parameter of that name
holds codes, which would give wrong results without an error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.core.private_torch import tree_map, wrapper_subclass, written_arguments
from hf_quant.errors import PlanError

# modules that move, share out or tie parameters, and need the parameter itself
MOVERS = ("torch.nn.modules.module", "torch.distributed.", "accelerate.")
READ_ONLY = (
    "the weights of this layer are codes, which cannot be written to: model.dequantize() gives a model of ordinary layers, "
    "to merge adapters into or to edit, and to save and quantize again; hf_quant.merge_adapters(model) merges PEFT's adapters "
    "into the codes"
)

TURNED = (
    "PEFT takes a Conv1D for a linear layer, and the weight that target_parameters names would be turned; "
    "target_modules with the name of the layer gives it an adapter"
)


class FloatWeight(Tensor):
    """Looks like the float weight, but is dequantized only when an operation uses it.

    Raises:
        PlanError: An operation writes to it.
    """

    _of: tuple[nn.Module, str]
    _read: Callable[[], Tensor]
    _write: Callable[[Tensor], None] | None

    @staticmethod
    def __new__(
        cls, of: tuple[nn.Module, str], read: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype,
        device: torch.device, write: Callable[[Tensor], None] | None = None,
    ) -> Any:  # fmt: skip
        assert wrapper_subclass is not None
        weight: Any = wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._of, weight._read, weight._write = of, read, write
        return weight

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]._again()
        if func is torch.ops.aten.set_.source_Tensor and args[0] is args[1]:
            return args[0]  # parametrizations do that, without changing anything
        if any(isinstance(argument, FloatWeight) for argument in written_arguments(func, args, kwargs or {})):
            raise PlanError(READ_ONLY)
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))

    def shows(self, module: nn.Module, name: str) -> bool:
        """Whether it is the weight of that name of ``module``, which PEFT assigns to the module when it removes an adapter."""
        return self._of == (module, name)

    def _again(self) -> FloatWeight:
        return FloatWeight(self._of, self._read, tuple(self.shape), self.dtype, self.device, self._write)

    @property
    def data(self) -> Tensor:
        """The tensor itself; PEFT merges adapters by assigning to it."""
        return self._again()

    @data.setter
    def data(self, value: Tensor) -> None:
        if self._write is None:
            raise PlanError(READ_ONLY)
        self._write(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._read()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._read().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FloatWeight({list(self.shape)}, dtype={self.dtype}, device={self.device}), stored as codes"


def _dense(value: Any) -> Any:
    return value._read() if isinstance(value, FloatWeight) else value


class Outside(nn.Module):
    """A module whose codes look like float weights from outside, after `finished` was called."""

    compute_dtype: torch.dtype
    conv1d: bool = False  # whether float weights are ``[K, N]``, as those of GPT-2's ``Conv1D``
    _finished: bool = False
    _adapted: bool = False  # whether PEFT has read a weight ``[K, N]``, as it does where it adds an adapter
    rewrite: Callable[[str, Tensor], None] | None = None  # receives new float weights while they may be set
    _held: dict[str, nn.Parameter] = {}  # noqa: RUF012  codes in whose place a parametrization stands; replaced, never changed

    def float_shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the float weight that a parameter encodes; None if the parameter holds no codes."""
        raise NotImplementedError

    def float_weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """That weight, in that shape, in ``dtype`` or else the dtype that the module computes in."""
        raise NotImplementedError

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As PyTorch's.

        Raises:
            PlanError: Codes are asked to train.
        """
        if requires_grad and self._finished:
            raise PlanError(
                f"{type(self).__name__}: codes do not train, as PEFT's modules_to_save would have them: leave this layer in floating "
                "point (modules_to_not_convert), give it an adapter, or load the base with HfQuantConfig(..., training=True)"
            )
        return super().requires_grad_(requires_grad)

    def finished(self) -> None:
        """Hide the codes from now on; before, transformers' loader has to see them."""
        self._finished = True
        for name in list(self._parameters):
            self._count(name)

    def _codes(self, name: str) -> nn.Parameter:
        """The parameter itself, with the codes."""
        parameter = self._parameters.get(name)
        return self._held[name] if parameter is None else parameter

    def _count(self, name: str) -> None:
        """Make the sizes of this layer's parameters add up to those of the float layer, for code that counts them (transformers, PEFT)."""
        shape = self.float_shape(name) if self._finished else None
        if shape is not None:
            others = [p for n, p in self._parameters.items() if n.startswith(f"{name}_") and n != f"{name}_bias"]
            total = math.prod(shape) - sum(math.prod(p.shape) for p in others if p is not None)
            self._codes(name).numel = partial(int, total)  # type: ignore[method-assign]

    def adapted(self, name: str) -> bool:
        """Whether the weight is parametrized, as by PEFT's adapters of stacked experts."""
        return name in self._held

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, FloatWeight) and value.shows(self, name)):
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """``torch.nn.utils.parametrize`` deletes the weight, and passes it to `register_buffer`."""
        if self._finished and name in self._parameters and self.float_shape(name) is not None:
            self._held = {**self._held, name: self._codes(name)}
            del self._parameters[name]
        else:
            super().__delattr__(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if isinstance(tensor, FloatWeight) and name in self._held:
            self._parameters[name] = self._held[name]
            self._held = {other: codes for other, codes in self._held.items() if other != name}
        else:
            super().register_buffer(name, tensor, persistent)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if self._finished and param is not None and param.is_floating_point() and self.float_shape(name) is not None:
            raise PlanError(READ_ONLY)
        super().register_parameter(name, param)

    def _seen(self, name: str) -> Any:
        """The value of ``module.name``."""
        if name not in self._parameters:
            raise AttributeError(name)
        shape = self.float_shape(name) if self._finished else None
        if shape is None:
            return self._parameters[name]
        if torch.compiler.is_compiling():  # unused results disappear from the graph, and callers cannot be told
            return self._turned(name, self._adapted)
        caller = sys._getframe(2).f_globals.get("__name__", "")
        if caller.startswith(MOVERS):
            return self._parameters[name]
        if self._adapted and caller == "torch.nn.utils.parametrize":
            raise PlanError(TURNED)
        turned = self.conv1d and caller.startswith("peft.")  # which takes this layer for the nn.Linear that it is
        self._adapted = self._adapted or turned
        if wrapper_subclass is None:
            return self._turned(name, turned)
        dtype = torch.float32 if self.rewrite else self.compute_dtype  # the new weight is rounded once, to codes
        write = partial(self.rewrite, name) if self.rewrite else None
        read, shape = partial(self._turned, name, turned, dtype), shape[::-1] if turned else shape
        return FloatWeight((self, name), read, shape, dtype, self._codes(name).device, write)

    def _turned(self, name: str, turned: bool, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.float_weight(name, dtype)
        return weight.T if turned else weight


def seen(name: str) -> Any:
    """A property of an `Outside` class that stands for the parameter ``name``."""
    return property(lambda module: module._seen(name), doc="The weight as code outside of this package sees it.")
