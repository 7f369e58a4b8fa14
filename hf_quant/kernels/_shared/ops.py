"""The table of contents of ``torch.ops.hf_quant``: of each operation its schema, what it may be given, and the shape of its result.

A kernel implements an operation of this table (`implements`); it adds no schema, check or fake of its own. Every operation gives
one tensor in the dtype and on the device of its first. What ``check`` refuses is named with the operation and the tensor
(`registration.Arguments`): device, dtype, shape, contiguity, and values where reading them waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.private_torch import refuse_forward_mode
from hf_quant.errors import KernelError
from hf_quant.kernels._shared import checks
from hf_quant.kernels._shared.registration import Arguments

OPS: dict[str, Any] = {}  # those that are implemented, by name; a kernel registers its own when it is imported


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes:
        arguments: Of its schema.
        check: Is given an `Arguments`, then the arguments; raises KernelError.
        shape: Of its result, from the arguments; None for that of the first tensor.
    """

    arguments: str
    check: Callable[..., None]
    shape: Callable[..., tuple[int, ...]] | None


def _rows_of(w: int, axis: int = 0) -> Callable[..., tuple[int, ...]]:
    """``[M, N]``: N is an axis of the w-th argument."""
    return lambda *args: (args[0].shape[0], args[w].shape[axis])


def _portable_back(grad: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> tuple[int, int]:
    return grad.shape[0], qweight.shape[1] * 8 // bits


PORTABLE = "Tensor qweight, Tensor scale, Tensor? zero, SymInt bits"
TILES = "Tensor tiles, Tensor scale, Tensor? zero"
UNITS = "Tensor? unit, Tensor? zero_unit, bool subtracted"
ROUNDED = "Tensor? columns, Tensor? input_scale"
PLANES = "Tensor packed, Tensor counters, Tensor scale, Tensor? zero, Tensor? table, Tensor? bias, Tensor? index, Tensor? value"
PLANES_BACK = "Tensor packed, Tensor scale, Tensor? zero, Tensor? table, Tensor? index, Tensor? value"

TABLE = {
    # weights in the portable layout, on every device
    "dequant_linear": Op(f"Tensor x, {PORTABLE}", checks.portable, _rows_of(1)),
    "dequant_linear_backward": Op(f"Tensor grad, {PORTABLE}", checks.portable_back, _portable_back),
    "codebook_linear": Op("Tensor x, Tensor qweight, Tensor scale, Tensor table", checks.codebook, _rows_of(1)),
    "codebook_linear_backward": Op(
        "Tensor grad, Tensor qweight, Tensor scale, Tensor table", checks.codebook_back,
        lambda grad, qweight, *_: (grad.shape[0], qweight.shape[1] * 2),
    ),
    # the compiled products of CPUs
    "cpu_native_linear": Op(
        f"Tensor x, {TILES}, {UNITS}, SymInt bits, SymInt n", checks.native,
        lambda *args: (args[0].shape[0], args[8]),
    ),
    "cpu_native_linear_backward": Op(
        f"Tensor grad, {TILES}, {UNITS}, SymInt bits", checks.native_back,
        lambda grad, tiles, *_: (grad.shape[0], tiles.shape[1] * 32),
    ),
    "cpu_native_int8_linear": Op(
        f"Tensor x, {TILES}, Tensor? columns, Tensor? ranges, SymInt bits, SymInt n", checks.native_int8,
        lambda *args: (args[0].shape[0], args[7]),
    ),
    # PyTorch's own packed products
    "cpu_int4_linear": Op(
        "Tensor x, Tensor planes, Tensor scale_and_zero, Tensor scale, Tensor? zero, SymInt group_size, SymInt fixed",
        checks.int4, _rows_of(1, 1),
    ),
    "cpu_int4_linear_backward": Op(
        "Tensor grad, Tensor planes, Tensor scale, Tensor? zero, SymInt fixed", checks.int4_back,
        lambda grad, planes, *_: (grad.shape[0], planes.shape[2] * 2),
    ),
    "cpu_int8_linear": Op(f"Tensor x, Tensor packed, Tensor scale, {ROUNDED}", checks.int8, _rows_of(2)),
    "cpu_int8_linear_backward": Op(
        "Tensor grad, Tensor packed, Tensor scale", checks.int8_back,
        lambda grad, packed, _: (grad.shape[0], packed.shape[0 if packed.is_mkldnn else 1]),
    ),
    # Triton
    "triton_wna16": Op(f"Tensor x, {PLANES}, str scheme", checks.wna16, _rows_of(1)),
    "triton_wna16_backward": Op(
        f"Tensor grad, {PLANES_BACK}, str scheme, SymInt k", checks.wna16_back,
        lambda *args: (args[0].shape[0], args[8]),
    ),
    "triton_experts": Op(
        f"Tensor x, {PLANES}, str scheme, Tensor ends, Tensor? order", checks.experts,
        lambda *args: ((args[0] if args[11] is None else args[11]).shape[0], args[1].shape[1]),
    ),
    "triton_experts_backward": Op(
        f"Tensor grad, {PLANES_BACK}, Tensor ends, str scheme, SymInt k", checks.experts_back,
        lambda *args: (args[0].shape[0], args[9]),
    ),
    "triton_int8": Op(f"Tensor x, {PORTABLE}, {ROUNDED}", checks.triton_int8, _rows_of(1)),
    "triton_int8_backward": Op(f"Tensor grad, {PORTABLE}", checks.portable_back, _portable_back),
    # outliers, and activations rounded in floating point
    "outlier_rows": Op("Tensor x, Tensor index, Tensor value", checks.outliers, _rows_of(1)),
    "outlier_rows_backward": Op(
        "Tensor grad, Tensor index, Tensor value, SymInt k", checks.outliers_back,
        lambda *args: (args[0].shape[0], args[3]),
    ),
    "round_activations": Op(
        "Tensor x, Tensor? columns, Tensor? scale, float threshold", checks.rounding, None,
    ),
}  # fmt: skip


def implements(name: str) -> Callable[[Callable[..., Tensor]], Any]:
    """Registers a function as the operation of that name, with the schema, check and fake of the table."""
    op = TABLE[name]
    types, names = zip(*(argument.split() for argument in op.arguments.split(", ")), strict=True)
    required = [i for i, kind in enumerate(types) if kind == "Tensor"]

    def register(function: Callable[..., Tensor]) -> Any:
        if tuple(signature(function).parameters) != names:
            raise TypeError(f"{name}: its arguments are {', '.join(names)}")

        @wraps(function)
        def checked(*args: Any) -> Tensor:
            for i in required:
                if args[i] is None:  # which PyTorch lets pass
                    raise KernelError(f"{name}: {names[i]} is None, must be a tensor")
            refuse_forward_mode(args[0])
            op.check(Arguments(name, args[0]), *args)
            return function(*args)

        def fake(*args: Any) -> Tensor:
            devices = sorted({str(arg.device) for arg in args if isinstance(arg, Tensor)})
            if len(devices) > 1:
                raise KernelError(f"{name}: tensors are on {' and '.join(devices)}: move them to one device")
            return torch.empty_like(args[0]) if op.shape is None else args[0].new_empty(op.shape(*args))

        schema = f"({op.arguments}) -> Tensor"
        OPS[name] = torch.library.custom_op(f"hf_quant::{name}", checked, mutates_args=(), schema=schema)
        OPS[name].register_fake(fake)
        return OPS[name]

    return register
