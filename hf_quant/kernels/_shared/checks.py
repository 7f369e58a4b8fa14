"""What every operation of `torch.ops.hf_quant` may be given: one function for each, named by the kernel that registers it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_quant.errors import SchemeError
from hf_quant.kernels._shared.registration import CODES, COLUMNS, FLOATS, Arguments
from hf_quant.kernels._triton.planar import layout, parsed

SCALES = (torch.float32, torch.bfloat16, torch.float16)  # what the compiled products read
MOST_GROUPS = 128  # that share a unit there
ZEROS = (torch.uint8, *FLOATS)
MOST_COLUMNS = 2**31 - 1  # their numbers are int32 in kernels


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
    a.number("fixed", fixed, 0, 255)
    p, n, half = a.axes("planes", planes, "[P, N, K / 2]", 3)
    a.rows(x, 2 * half)
    _planes(a, p, n, half, planes, scale, zero)
    if group_size not in (32, 64, 128, 256) or 2 * half % group_size:
        a.refuse(f"group_size must be 32, 64, 128 or 256 and divide {2 * half} columns, got {group_size}")
    a.tensor("scale_and_zero", scale_and_zero, "[P, K / group_size, N, 2]", (p, 2 * half // group_size, n, 2),
             (torch.bfloat16,), contiguous=True)  # fmt: skip


def int4_back(a: Arguments, grad: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, fixed: int) -> None:
    """``grad [M, N]`` and the weight of `int4`."""
    a.number("fixed", fixed, 0, 255)
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
        if rows != n or packed.dtype is not torch.int8:
            a.refuse(f"packed is {packed.dtype} {[k, rows]}, must be torch.int8 [K, N] with N = {n}")
    else:
        _, k = a.axes("packed", packed, "[N, K]", 2)
        a.tensor("packed", packed, "[N, K]", (n, k), (torch.int8,), contiguous=True)
    a.tensor("scale", scale, "[N]", (n,), (torch.float32,), contiguous=True)
    return k


# ---- the compiled products


def native(
    a: Arguments, x: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, unit: Tensor | None,
    zero_unit: Tensor | None, subtracted: bool, bits: int, n: int,
) -> None:  # fmt: skip
    """See `cpu_native.cpu_native_linear`."""
    a.rows(x, native_weight(a, tiles, scale, zero, unit, zero_unit, subtracted, bits, n))


def native_int8(
    a: Arguments, x: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None,
    ranges: Tensor | None, bits: int, n: int,
) -> None:  # fmt: skip
    """See `cpu_native_int8.cpu_native_int8_linear`."""
    k = native_weight(a, tiles, scale, zero, None, None, False, bits, n)
    a.rows(x, k)
    a.columns(columns, k)
    a.input_scale(ranges, "ranges")


def native_back(
    a: Arguments, grad: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, unit: Tensor | None,
    zero_unit: Tensor | None, subtracted: bool, bits: int,
) -> None:  # fmt: skip
    """``grad [M, N]`` and the weight of `native`."""
    a.kind("grad", grad, FLOATS)
    _, n = a.axes("grad", grad, "[M, N]", 2)
    if not n:
        a.refuse("grad has no columns")
    native_weight(a, tiles, scale, zero, unit, zero_unit, subtracted, bits, n)


def native_weight(
    a: Arguments, tiles: Tensor, scale: Tensor, zero: Tensor | None, unit: Tensor | None, zero_unit: Tensor | None,
    subtracted: bool, bits: int, n: int,
) -> int:  # fmt: skip
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
    if scale.numel() == 1 and zero is None and unit is None:  # one for the whole weight
        a.kind("scale", scale, SCALES[:1])
        return k
    shape, meaning = (many, groups, 16), "[ceil(N / 16), G, 16]"
    a.tensor("scale", scale, meaning, shape, CODES if unit is not None else SCALES, contiguous=True)
    a.tensor(
        "zero", zero, meaning, shape, SCALES if subtracted and unit is None else (*CODES, *SCALES), contiguous=True
    )
    if unit is not None:
        _units(a, unit, zero, zero_unit, subtracted, many, groups)
    elif zero_unit is not None:
        a.refuse("zero_unit must be None where unit is")
    return k


def _units(
    a: Arguments, unit: Tensor, zero: Tensor | None, zero_unit: Tensor | None, subtracted: bool, many: int, groups: int
) -> None:
    _, parts, _ = a.axes("unit", unit, "[ceil(N / 16), B, 16]", 3)
    if parts < 1 or groups % parts or (groups // parts).bit_count() != 1 or groups // parts > MOST_GROUPS:
        a.refuse(f"unit has {parts} parts, {groups} groups cannot be shared out among so many")
    for name, tensor in (("unit", unit), ("zero_unit", zero_unit)):
        a.tensor(name, tensor, "[ceil(N / 16), B, 16]", (many, parts, 16), SCALES[:1], contiguous=True)
    if (zero is None) != (zero_unit is None) or subtracted != (zero is not None):
        a.refuse("with unit, zero must have zero_unit, and be subtracted")
    if zero is not None:
        a.kind("zero", zero, CODES)


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
    a.number("k", k, 1, MOST_COLUMNS)
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
    if not threshold >= 0:
        a.refuse(f"threshold must be 0 or above, got {threshold}")


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
    a.number("columns of x", k, 1, MOST_COLUMNS)
    n, _ = a.axes("packed", packed, "[N, words]", 2)
    a.tensor("bias", bias, "[N]", (n,), FLOATS)
    a.tensor("counters", counters, "[tiles]", tuple(counters.shape[:1]), (torch.int32,), contiguous=True)
    _words(a, (), n, k, packed, scale, zero, table, index, value, scheme)


def wna16_back(
    a: Arguments, grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    index: Tensor | None, value: Tensor | None, scheme: str, k: int,
) -> None:  # fmt: skip
    """``grad [M, N]`` and the weight of `wna16`."""
    a.number("k", k, 1, MOST_COLUMNS)
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
    a.number("columns of x", k, 1, MOST_COLUMNS)
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
    a.number("k", k, 1, MOST_COLUMNS)
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
        a.refuse(f"scheme: {error}")
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
