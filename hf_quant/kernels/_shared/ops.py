"""The operations registered with PyTorch under ``torch.ops.hf_quant``, and what each of them may be given.

A kernel reads memory by address, so every tensor is checked before it: its device, dtype, shape and, where the kernel
wants it, contiguity. The message names the operation and the tensor. Values are read only where that waits for nobody:
on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor

from hf_quant.core.scheme import BITS
from hf_quant.errors import KernelError, SchemeError
from hf_quant.kernels._shared.private_torch import refuse_forward_mode
from hf_quant.kernels._triton.planar import layout, parsed

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALES = (torch.float32, torch.bfloat16)  # what the compiled products read
CODES = (torch.uint8,)
ZEROS = (torch.uint8, *FLOATS)
COLUMNS = (torch.int16, torch.int32, torch.int64)

OPS: dict[str, Any] = {}  # by name; filled by `op`


class Arguments:
    """The arguments of one call.

    Args:
        op: Name of the operation.
        x: Its first tensor; all others must be on the same device.
    """

    __slots__ = ("device", "op")

    def __init__(self, op: str, x: Tensor) -> None:
        self.op, self.device = op, x.device

    def refuse(self, message: str) -> NoReturn:
        """End the call."""
        raise KernelError(f"{self.op}: {message}")

    def kind(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        """Check the device, layout and dtype of ``tensor``."""
        if tensor.device != self.device:
            self.refuse(f"{name} is on {tensor.device}, the first tensor on {self.device}: move them to one device")
        if tensor.layout is not torch.strided:
            self.refuse(f"{name} is {tensor.layout}, must be an ordinary (strided) tensor")
        if tensor.dtype not in dtypes:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            self.refuse(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, must be one of {wanted}")

    def tensor(
        self, name: str, tensor: Tensor | None, meaning: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...],
        *, contiguous: bool = False,
    ) -> None:  # fmt: skip
        """Check ``tensor``, where there is one; ``meaning`` says in letters what its shape must be."""
        if tensor is None:
            return
        self.kind(name, tensor, dtypes)
        if tensor.shape != shape:
            self.refuse(f"{name} has shape {list(tensor.shape)}, must be {meaning} = {list(shape)}")
        if contiguous and not tensor.is_contiguous():
            self.refuse(f"{name} is not contiguous: its strides are {list(tensor.stride())}")

    def axes(self, name: str, tensor: Tensor, meaning: str, count: int) -> tuple[int, ...]:
        """The shape of ``tensor``, which must have ``count`` axes."""
        shape = tuple(tensor.shape)
        if len(shape) != count:
            self.refuse(f"{name} has shape {list(shape)}, must be {meaning}")
        return shape

    def rows(self, x: Tensor, columns: int) -> None:
        """Check that ``x`` is ``[M, K]`` for a weight of K ``columns``."""
        self.kind("x", x, FLOATS)
        _, k = self.axes("x", x, "[M, K]", 2)
        if k != columns:
            self.refuse(f"x has {k} columns, the weight has {columns}")

    def bits(self, bits: int, allowed: tuple[int, ...] = BITS) -> None:
        """Check the width of a code."""
        if bits not in allowed:
            self.refuse(f"bits must be one of {', '.join(map(str, allowed))}, got {bits}")

    def groups(self, groups: int, columns: int, multiple: int = 1) -> None:
        """Check that so many groups share out ``columns``, each a multiple of ``multiple``."""
        if groups < 1 or columns < 1 or columns % groups or columns // groups % multiple:
            of = f" of a multiple of {multiple} columns" if multiple > 1 else ""
            self.refuse(f"scale has {groups} groups, {columns} columns cannot be shared out among so many{of}")

    def columns(self, index: Tensor | None, columns: int) -> None:
        """Check a list of columns that are left out."""
        if index is not None:
            self.axes("columns", index, "[C]", 1)
            self.numbers("columns", index, columns)

    def numbers(self, name: str, index: Tensor, columns: int) -> None:
        """Check that every entry is the number of one of ``columns``."""
        self.kind(name, index, COLUMNS)
        if (message := outside(index, columns)) is not None:
            self.refuse(f"{name} {message}")

    def input_scale(self, scale: Tensor | None, name: str = "input_scale") -> None:
        """Check the one scale of all activations."""
        self.tensor(name, scale, "[1]", (1,), FLOATS)
        if scale is not None and scale.is_cpu and not 0 < float(scale) < torch.inf:
            self.refuse(f"{name} must be a finite number above 0, got {float(scale)}")


def outside(index: Tensor, columns: int) -> str | None:
    """What is wrong with numbers of columns that a kernel reads by; None where nothing is, or where a GPU holds them."""
    if not index.is_cpu or not index.numel():
        return None
    least, most = (int(end) for end in index.aminmax())
    if least >= 0 and most < columns:
        return None
    return f"names column {least if least < 0 else most}, there are columns 0 to {columns - 1}"


Check = Callable[..., None]


def op(name: str, check: Check) -> Callable[[Callable[..., Tensor]], Any]:
    """Registers a function as ``torch.ops.hf_quant.<name>``; ``check`` sees its arguments first, after an `Arguments`."""

    def register(function: Callable[..., Tensor]) -> Any:
        @wraps(function)
        def checked(*args: Any) -> Tensor:
            refuse_forward_mode(args[0])
            check(Arguments(name, args[0]), *args)
            return function(*args)

        OPS[name] = torch.library.custom_op(f"hf_quant::{name}", checked, mutates_args=())
        return OPS[name]

    return register


def fake(op: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers what ``op`` gives for tensors without values; such a tensor among others is refused."""
    name = next(name for name, known in OPS.items() if known is op)

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(function)
        def checked(*args: Any) -> Tensor:
            devices = sorted({str(arg.device) for arg in args if isinstance(arg, Tensor)})
            if len(devices) > 1:
                raise KernelError(f"{name}: tensors are on {' and '.join(devices)}: move them to one device")
            return function(*args)

        op.register_fake(checked)
        return checked

    return register


# ---- portable codes


def portable(a: Arguments, x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> None:
    """``x [M, K]``, qweight uint8 ``[N, K / 8 * bits]``, scale ``[N, G]``, zero like it or uint8."""
    a.bits(bits)
    n, width = a.axes("qweight", qweight, "[N, K / 8 * bits]", 2)
    k = width * 8 // bits
    a.rows(x, k)
    _portable_weight(a, n, k, qweight, scale, zero, bits)


def portable_back(a: Arguments, grad: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> None:
    """``grad [M, N]`` and the weight of `portable`."""
    a.bits(bits)
    n, width = a.axes("qweight", qweight, "[N, K / 8 * bits]", 2)
    _gradient(a, grad, n)
    _portable_weight(a, n, width * 8 // bits, qweight, scale, zero, bits)


def codebook(a: Arguments, x: Tensor, qweight: Tensor, scale: Tensor, table: Tensor) -> None:
    """Like `portable` with four bits, and table float32 ``[16]``."""
    portable(a, x, qweight, scale, None, 4)
    a.tensor("table", table, "[16]", (16,), (torch.float32,))


def codebook_back(a: Arguments, grad: Tensor, qweight: Tensor, scale: Tensor, table: Tensor) -> None:
    """Like `portable_back` with four bits, and table float32 ``[16]``."""
    portable_back(a, grad, qweight, scale, None, 4)
    a.tensor("table", table, "[16]", (16,), (torch.float32,))


def _portable_weight(
    a: Arguments, n: int, k: int, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> None:
    a.tensor("qweight", qweight, "[N, K / 8 * bits]", (n, k * bits // 8), CODES)
    _scales(a, n, k, scale, zero)


def _scales(a: Arguments, n: int, k: int, scale: Tensor, zero: Tensor | None) -> None:
    _, groups = a.axes("scale", scale, "[N, G]", 2)
    a.groups(groups, k)
    a.tensor("scale", scale, "[N, G]", (n, groups), FLOATS)
    a.tensor("zero", zero, "[N, G]", (n, groups), ZEROS)


def _gradient(a: Arguments, grad: Tensor, rows: int) -> None:
    a.kind("grad", grad, FLOATS)
    _, n = a.axes("grad", grad, "[M, N]", 2)
    if n != rows:
        a.refuse(f"grad has {n} columns, the weight has {rows} rows")


# ---- PyTorch's own packed products


def int4(
    a: Arguments, x: Tensor, planes: Tensor, scale_and_zero: Tensor, scale: Tensor, zero: Tensor | None,
    group_size: int, fixed: int,
) -> None:  # fmt: skip
    """See `cpu_int4.cpu_int4_linear`."""
    p, n, half = a.axes("planes", planes, "[P, N, K / 2]", 3)
    a.rows(x, 2 * half)
    _planes(a, p, n, half, planes, scale, zero)
    if group_size not in (32, 64, 128, 256) or 2 * half % group_size:
        a.refuse(f"group_size must be 32, 64, 128 or 256 and divide {2 * half} columns, got {group_size}")
    a.tensor("scale_and_zero", scale_and_zero, "[P, K / group_size, N, 2]", (p, 2 * half // group_size, n, 2),
             (torch.bfloat16,), contiguous=True)  # fmt: skip


def int4_back(a: Arguments, grad: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, fixed: int) -> None:
    """``grad [M, N]`` and the weight of `int4`."""
    p, n, half = a.axes("planes", planes, "[P, N, K / 2]", 3)
    _gradient(a, grad, n)
    _planes(a, p, n, half, planes, scale, zero)


def _planes(a: Arguments, p: int, n: int, half: int, planes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    _only_cpu(a)
    if p not in (1, 2) or n % 16 or half % 16 or not n:
        a.refuse(
            f"planes has shape {list(planes.shape)}, must be [P, N, K / 2]: P 1 or 2, N a multiple of 16, K of 32"
        )
    a.tensor("planes", planes, "[P, N, K / 2]", (p, n, half), CODES, contiguous=True)
    _scales(a, n, 2 * half, scale, zero)


def int8(
    a: Arguments, x: Tensor, packed: Tensor, scale: Tensor, columns: Tensor | None, input_scale: Tensor | None
) -> None:
    """See `cpu_int8.cpu_int8_linear`."""
    k = _packed(a, packed, scale)
    a.rows(x, k)
    a.columns(columns, k)
    a.input_scale(input_scale)


def int8_back(a: Arguments, grad: Tensor, packed: Tensor, scale: Tensor) -> None:
    """``grad [M, N]`` and the weight of `int8`."""
    _packed(a, packed, scale)
    _gradient(a, grad, scale.shape[0])


def _packed(a: Arguments, packed: Tensor, scale: Tensor) -> int:
    """K."""
    _only_cpu(a)
    (n,) = a.axes("scale", scale, "[N]", 1)
    if packed.is_mkldnn:  # oneDNN's own layout, of the transposed weight
        k, rows = a.axes("packed", packed, "[K, N]", 2)
        if rows != n:
            a.refuse(f"packed has shape {[k, rows]}, must be [K, N] with N = {n}")
    else:
        _, k = a.axes("packed", packed, "[N, K]", 2)
        a.tensor("packed", packed, "[N, K]", (n, k), (torch.int8,), contiguous=True)
    a.tensor("scale", scale, "[N]", (n,), (torch.float32,), contiguous=True)
    return k


# ---- the compiled products


def native(a: Arguments, x: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int, n: int) -> None:
    """See `cpu_native.cpu_native_linear`."""
    a.rows(x, native_weight(a, tiles, scale, zero, bits, n))


def native_int8(
    a: Arguments, x: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None,
    ranges: Tensor | None, bits: int, n: int,
) -> None:  # fmt: skip
    """See `cpu_native_int8.cpu_native_int8_linear`."""
    k = native_weight(a, tiles, scale, zero, bits, n)
    a.rows(x, k)
    a.columns(columns, k)
    a.input_scale(ranges, "ranges")


def native_back(a: Arguments, grad: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> None:
    """``grad [M, N]`` and the weight of `native`."""
    a.kind("grad", grad, FLOATS)
    native_weight(a, tiles, scale, zero, bits, a.axes("grad", grad, "[M, N]", 2)[1])


def native_weight(a: Arguments, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int, n: int) -> int:
    """Checks a weight that is laid out as ``_native/csrc/cpu.h`` says, and gives K."""
    _only_cpu(a)
    a.bits(bits)
    if n < 1:
        a.refuse(f"n must be at least 1, got {n}")
    _, blocks, _ = a.axes("tiles", tiles, "[ceil(N / 16), K / 32, 64 bits]", 3)
    k, many = 32 * blocks, -(-n // 16)
    a.tensor("tiles", tiles, "[ceil(N / 16), K / 32, 64 bits]", (many, blocks, 64 * bits), CODES, contiguous=True)
    _, groups, _ = a.axes("scale", scale, "[ceil(N / 16), G, 16]", 3)
    a.groups(groups, k, 32)
    a.tensor("scale", scale, "[ceil(N / 16), G, 16]", (many, groups, 16), SCALES, contiguous=True)
    a.tensor("zero", zero, "[ceil(N / 16), G, 16]", (many, groups, 16), (scale.dtype,), contiguous=True)
    return k


def _only_cpu(a: Arguments) -> None:
    if a.device.type != "cpu":
        a.refuse(f"runs on a CPU only, the first tensor is on {a.device}")


# ---- outliers, and activations that are rounded


def outliers(a: Arguments, x: Tensor, index: Tensor, value: Tensor) -> None:
    """``x [M, K]``, index integers ``[N, R]`` from 0 to K - 1, value ``[N, R]``."""
    a.kind("x", x, FLOATS)
    _outliers(a, index, value, a.axes("x", x, "[M, K]", 2)[1])


def outliers_back(a: Arguments, grad: Tensor, index: Tensor, value: Tensor, k: int) -> None:
    """``grad [M, N]`` and the weight of `outliers`."""
    _outliers(a, index, value, k)
    _gradient(a, grad, index.shape[0])


def _outliers(a: Arguments, index: Tensor, value: Tensor, k: int) -> None:
    n, r = a.axes("index", index, "[N, R]", 2)
    a.numbers("index", index, k)
    a.tensor("value", value, "[N, R]", (n, r), FLOATS)


def rounding(a: Arguments, x: Tensor, columns: Tensor | None, scale: Tensor | None, threshold: float) -> None:
    """``x [M, K]``, columns integers ``[C]`` from 0 to K - 1, scale ``[1]``."""
    a.kind("x", x, FLOATS)
    a.columns(columns, a.axes("x", x, "[M, K]", 2)[1])
    a.input_scale(scale, "scale")


# ---- Triton


def triton_int8(
    a: Arguments, x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: Tensor | None,
    input_scale: Tensor | None,
) -> None:  # fmt: skip
    """See `triton_int8.triton_int8`."""
    a.bits(bits, (4, 8))
    portable(a, x, qweight, scale, zero, bits)
    a.columns(columns, x.shape[1])
    a.input_scale(input_scale)


def wna16(
    a: Arguments, x: Tensor, packed: Tensor, counters: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    bias: Tensor | None, index: Tensor | None, value: Tensor | None, scheme: str,
) -> None:  # fmt: skip
    """See `triton_wna16.triton_wna16`."""
    a.kind("x", x, FLOATS)
    _, k = a.axes("x", x, "[M, K]", 2)
    n, _ = a.axes("packed", packed, "[N, words]", 2)
    a.tensor("bias", bias, "[N]", (n,), FLOATS)
    a.tensor("counters", counters, "[tiles]", tuple(counters.shape[:1]), (torch.int32,), contiguous=True)
    _words(a, (), n, k, packed, scale, zero, table, index, value, scheme)


def wna16_back(
    a: Arguments, grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    index: Tensor | None, value: Tensor | None, scheme: str, k: int,
) -> None:  # fmt: skip
    """``grad [M, N]`` and the weight of `wna16`."""
    n, _ = a.axes("packed", packed, "[N, words]", 2)
    _gradient(a, grad, n)
    _words(a, (), n, k, packed, scale, zero, table, index, value, scheme)


def experts(
    a: Arguments, x: Tensor, packed: Tensor, counters: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    bias: Tensor | None, index: Tensor | None, value: Tensor | None, scheme: str, ends: Tensor, order: Tensor | None,
) -> None:  # fmt: skip
    """See `triton_wna16.triton_experts`."""
    a.kind("x", x, FLOATS)
    m, k = a.axes("x", x, "[M, K]", 2)
    e, n, _ = a.axes("packed", packed, "[E, N, words]", 3)
    a.tensor("bias", bias, "[E, N]", (e, n), FLOATS)
    a.tensor("counters", counters, "[tiles]", tuple(counters.shape[:1]), (torch.int32,), contiguous=True)
    a.tensor("ends", ends, "[E]", (e,), (torch.int64,), contiguous=True)
    if order is not None:
        top_k = order.numel() // max(1, m)
        a.tensor("order", order, "[M top_k]", (m * top_k,), (torch.int64,), contiguous=True)
    _words(a, (e,), n, k, packed, scale, zero, table, index, value, scheme)


def experts_back(
    a: Arguments, grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    index: Tensor | None, value: Tensor | None, ends: Tensor, scheme: str, k: int,
) -> None:  # fmt: skip
    """``grad [rows, N]`` and the weights of `experts`."""
    e, n, _ = a.axes("packed", packed, "[E, N, words]", 3)
    _gradient(a, grad, n)
    a.tensor("ends", ends, "[E]", (e,), (torch.int64,), contiguous=True)
    _words(a, (e,), n, k, packed, scale, zero, table, index, value, scheme)


def _words(
    a: Arguments, lead: tuple[int, ...], n: int, k: int, packed: Tensor, scale: Tensor, zero: Tensor | None,
    table: Tensor | None, index: Tensor | None, value: Tensor | None, slug: str,
) -> None:  # fmt: skip
    """Codes in planes (`_triton.planar`), and what goes with them."""
    try:
        scheme = parsed(slug)
        groups, width = layout(scheme, k)
    except SchemeError as error:
        a.refuse(str(error))
    e = "E, " if lead else ""
    a.tensor("packed", packed, f"[{e}N, words]", (*lead, n, width), (torch.int16,), contiguous=True)
    a.tensor("scale", scale, f"[{e}G, N]", (*lead, groups, n), FLOATS, contiguous=True)
    a.tensor("zero", zero, f"[{e}G, N]", (*lead, groups, n), ZEROS, contiguous=True)
    a.tensor("table", table, "[16]", (16,), (torch.float32,), contiguous=True)
    if (zero is None) != scheme.symmetric or (table is None) != (scheme.codebook is None):
        a.refuse(f"zero or table are missing, or not wanted, for the scheme {slug}")
    if (index is None) != (value is None):
        a.refuse("index and value go together")
    if index is None or value is None:
        return
    a.numbers("index", index, k)
    count = index.shape[-1] if index.ndim else 0
    shape = (*lead, n, count) if index.ndim == packed.ndim else (*lead, count)
    a.tensor("index", index, f"[{e}C] or [{e}N, R]", shape, COLUMNS)
    a.tensor("value", value, f"[{e}N, C]", (*lead, n, count), FLOATS)
