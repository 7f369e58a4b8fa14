"""The Triton kernels of `triton_wna16`: one product for every width, and one that only dequantizes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(
    planes, word, table_ptr, J: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr, AT: tl.constexpr,
    FIXED: tl.constexpr, FOLD: tl.constexpr, shift, zero, dtype: tl.constexpr,
):  # fmt: skip
    """Plane J of the words as ``code - zero point`` in ``dtype``: the weights but for their scale.

    ``shift`` is a zero point that is subtracted together with the plane's base, or None; ``zero`` one subtracted on its own.
    With FOLD nothing is subtracted here: the base stays in.
    """
    if ASM is not None:
        w = planes[J]
        if AT >= 0:
            position: tl.constexpr = (AT >> (4 * J)) & 15
            base: tl.constexpr = (128 if dtype == tl.bfloat16 else 1024) / (1 << position)
            if position > 0:
                w = w * (1.0 / (1 << position))
            w = w - (base + FIXED) if shift is None else w - (shift + base).to(dtype)
            w = w.to(dtype)
    else:
        code = (word.to(tl.uint16, bitcast=True) >> (BITS * J)) & ((1 << BITS) - 1)
        if table_ptr is not None:
            w = tl.load(table_ptr + code.to(tl.int32)).to(dtype)
        elif BITS <= 4 and dtype != tl.float32:
            bf16: tl.constexpr = dtype == tl.bfloat16
            plain: tl.constexpr = 128 if bf16 else 1024
            w = (code | (0x4300 if bf16 else 0x6400)).to(tl.uint16).to(dtype, bitcast=True)
            if not FOLD:
                w = w - (plain + FIXED) if shift is None else w - (shift + plain).to(dtype)
                w = w.to(dtype)
        else:
            w = code.to(tl.float32) - FIXED if shift is None else code.to(tl.float32) - shift
            w = w.to(dtype)
    if zero is not None:
        w = w - zero
    return w


@triton.jit(do_not_specialize=["M"])  # Triton makes a constant of 1, which has no `to`; and one kernel does for all M
def wna16_kernel(
    x_ptr, word_ptr, scale_ptr, zero_ptr, table_ptr, bias_ptr, index_ptr, value_ptr, y_ptr, part_ptr, count_ptr,
    tile_ptr, row_ptr,
    M, N, K, WORDS, GROUPS, OUTLIERS,
    BITS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, RUN: tl.constexpr, ZERO: tl.constexpr,
    ASM: tl.constexpr, OPERANDS: tl.constexpr, AT: tl.constexpr, FIXED: tl.constexpr, FOLD: tl.constexpr,
    AFTER: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[M, N] = x[M, K] @ W[N, K].T + bias + outliers, W in planes (`_triton.planar`), computed as W @ x.T.

    With the weights on the left they go from memory through registers into the matrix instructions; eight rows of x are
    the least, and cost half of sixteen on the other side.

    GROUP is 0 for one scale a row. RUN planes share a scale; AFTER multiplies their sum by it in float32, else each weight.
    ZERO: 1 for integers, which are part of what is subtracted anyway, 2 for zero points that are subtracted on their own.
    FOLD: zero points and the base of the planes times the sum of x are subtracted from the sum instead, where 16-bit
    arithmetic is slow.
    EVEN: K fills whole blocks. COLUMNS: outliers are columns of all rows. tile_ptr: rows of x in tiles of one expert each.

    SPLIT_K programs share a tile; each leaves its part in part_ptr, and the last to arrive, which count_ptr tells, adds the
    parts in their order: which one it is makes no difference to the sum. It leaves count_ptr zero, as it was.
    """
    F: tl.constexpr = 16 // BITS
    dtype = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N
    r = tl.arange(0, P)
    part = tl.program_id(2)
    if tile_ptr is None:
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_ok = m < M
        x_row = m
    else:
        tile = tile_ptr + 3 * tl.program_id(1)
        expert = tl.load(tile).to(tl.int64)
        if expert < 0:
            return
        m = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
        m_ok = m < tl.load(tile + 2)
        x_row = m
        if row_ptr is not None:
            x_row = tl.load(row_ptr + m, mask=m_ok, other=0) // TOP_K
        word_ptr += expert * N * WORDS
        scale_ptr += expert * N * GROUPS
        if zero_ptr is not None:
            zero_ptr += expert * N * GROUPS
        if bias_ptr is not None:
            bias_ptr += expert * N
        if index_ptr is not None:
            index_ptr += expert * (OUTLIERS if COLUMNS else N * OUTLIERS)
            value_ptr += expert * N * OUTLIERS
    x_at = x_ptr + x_row.to(tl.int64)[None, :] * K  # [1, BLOCK_M]
    word_at = word_ptr + tl.where(n_ok, n, 0)[:, None].to(tl.int64) * WORDS + r[None, :]
    ok = m_ok[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    sums = tl.zeros((1, BLOCK_M), dtype=tl.float32)
    base: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    blocks = WORDS // P
    blocks_per_part = tl.cdiv(blocks, SPLIT_K)
    for block in tl.range(part * blocks_per_part, tl.minimum(blocks, (part + 1) * blocks_per_part), num_stages=STAGES):
        word = tl.load(word_at + tl.multiple_of(block * P, 16))
        planes = word
        if ASM is not None:
            planes = tl.inline_asm_elementwise(ASM, OPERANDS, [word], dtype=(dtype,) * F, is_pure=True, pack=2)
        for run in tl.static_range(F // RUN):
            k0 = block * (F * P) + run * (RUN * P)
            g = 0
            if GROUP > 0:
                g = k0 // GROUP if EVEN else tl.minimum(k0 // GROUP, GROUPS - 1)
                scale = tl.load(scale_ptr + g * N + n, mask=n_ok, other=0.0)[:, None]
            shift = None
            zero = None
            if ZERO > 0 and not FOLD:
                z = tl.load(zero_ptr + g * N + n, mask=n_ok, other=0).to(tl.float32)[:, None]
                if ZERO == 1:
                    shift = z
                else:
                    zero = (z - FIXED).to(dtype)
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for i in tl.static_range(RUN):
                k = tl.multiple_of(k0 + i * P, 16) + r[:, None]
                x = tl.load(x_at + k, mask=ok if EVEN else ok & (k < K), other=0.0)
                w = _weights(planes, word, table_ptr, run * RUN + i, BITS, ASM, AT, FIXED, FOLD, shift, zero, dtype)
                if FOLD:
                    sums += tl.sum(x.to(tl.float32), 0)[None, :]
                if GROUP == 0:
                    acc = tl.dot(w, x, acc, input_precision="ieee")
                elif AFTER:
                    total = tl.dot(w, x, total, input_precision="ieee")
                else:
                    acc = tl.dot(w * scale.to(dtype), x, acc, input_precision="ieee")
            if GROUP > 0 and FOLD:
                z = FIXED
                if ZERO > 0:
                    z = tl.load(zero_ptr + g * N + n, mask=n_ok, other=0).to(tl.float32)[:, None]
                total -= (z + base) * sums
                sums = tl.zeros((1, BLOCK_M), dtype=tl.float32)
            if GROUP > 0 and AFTER:
                acc += total * scale.to(tl.float32)
    if GROUP == 0:
        if FOLD:
            z = FIXED
            if ZERO > 0:
                z = tl.load(zero_ptr + n, mask=n_ok, other=0).to(tl.float32)[:, None]
            acc -= (z + base) * sums
        acc *= tl.load(scale_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]

    if index_ptr is not None:
        at = n.to(tl.int64) * OUTLIERS
        if COLUMNS:  # one more step, of 16 gathered columns at a time
            for c0 in range(16 * part, OUTLIERS, 16 * SPLIT_K):
                c = c0 + tl.arange(0, 16)
                c_ok = c < OUTLIERS
                column = tl.load(index_ptr + c, mask=c_ok, other=0)
                x = tl.load(x_at + column[:, None], mask=ok & c_ok[:, None], other=0.0)
                value = tl.load(value_ptr + at[:, None] + c[None, :], mask=n_ok[:, None] & c_ok[None, :], other=0.0)
                acc = tl.dot(value.to(dtype), x, acc, input_precision="ieee")
        else:
            for c in range(part, OUTLIERS, SPLIT_K):
                column = tl.load(index_ptr + at + c, mask=n_ok, other=0)
                value = tl.load(value_ptr + at + c, mask=n_ok, other=0.0).to(tl.float32)
                x = tl.load(x_at + column[:, None], mask=ok & n_ok[:, None], other=0.0)
                acc += x.to(tl.float32) * value[:, None]

    if tile_ptr is not None:  # asked again, or the registers would be held until here
        m = tl.load(tile + 1, volatile=True) + tl.arange(0, BLOCK_M)
        ok = (m < tl.load(tile + 2, volatile=True))[None, :]
    at = m[None, :].to(tl.int64) * N + n[:, None]
    ok = ok & n_ok[:, None]
    if SPLIT_K > 1:
        size = M.to(tl.int64) * N
        tl.store(part_ptr + part * size + at, acc, mask=ok)
        tl.debug_barrier()  # all of this program's parts are there before it says so
        count = count_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(count, 1, sem="acq_rel") == SPLIT_K - 1
        ok = ok & (n < tl.where(last, N, 0))[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for i in range(SPLIT_K):
            acc += tl.load(part_ptr + i * size + at, mask=ok, other=0.0, cache_modifier=".cg")
        tl.store(count, 0, mask=last)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def dequantize_kernel(
    word_ptr, scale_ptr, zero_ptr, table_ptr, w_ptr, FIRST, ROWS, N, K, WORDS, GROUPS,
    BITS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, FIXED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """w[ROWS, K] = the rows from FIRST on of W[N, K], in float32 and rounded once."""
    F: tl.constexpr = 16 // BITS
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    r = tl.arange(0, P)
    n = FIRST + row
    ok = (row < ROWS)[:, None]
    word = tl.load(word_ptr + n[:, None].to(tl.int64) * WORDS + block * P + r[None, :], mask=ok, other=0)
    for j in tl.static_range(F):
        k = (block * F + j) * P + r
        g = 0
        if GROUP > 0:
            g = tl.minimum((block * F + j) * P // GROUP, GROUPS - 1)
        in_k = (block * F + j) * P + r < K
        scale = tl.load(scale_ptr + g * N + n, mask=row < ROWS, other=0.0).to(tl.float32)
        code = (word.to(tl.uint16, bitcast=True) >> (BITS * j)) & ((1 << BITS) - 1)
        if table_ptr is not None:
            w = tl.load(table_ptr + code.to(tl.int32)).to(tl.float32)
        elif zero_ptr is not None:
            zero = tl.load(zero_ptr + g * N + n, mask=row < ROWS, other=0).to(tl.float32)
            w = code.to(tl.float32) - zero[:, None]
        else:
            w = code.to(tl.float32) - FIXED
        w = w * scale[:, None]
        at = row[:, None].to(tl.int64) * K + k[None, :]
        tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=ok & in_k[None, :])
