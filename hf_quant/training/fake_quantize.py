"""Fake quantization with learned step sizes: the forward pass rounds a float weight to its grid, the backward pass looks
through the rounding.

The step size (scale) is trained as in LSQ (arXiv:1902.08153). Where a scheme has zero points, what is trained beside it is the
offset, the real value of code 0 with its sign changed: it has the unit of the weights, so that one learning rate suits all
three. This is the learned range of LSQ+ (arXiv:2004.09576).

The arithmetic is that of `QuantizedTensor.dequantize`, and the scale is rounded to the dtype that it will be stored in, so the
rounded weights of the last training step are those of the saved checkpoint, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.core.numerics import floored, quantize, quantize_rows
from hf_quant.core.scheme import QuantScheme

CACHED = 1 << 17  # weights that a core works on at a time: 512 kB in float32


def grid(scale: Tensor, offset: Tensor | None, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scale as it will be stored, and the zero point.

    Args:
        scale: ``[..., N, G]``, trained.
        offset: ``[..., N, G]``, trained; None where the zero point is fixed.
        bits: Width of one code.
        dtype: What scales are stored in.

    Returns:
        Scale and zero point ``[..., N, G, 1]`` in the dtype of ``scale``.
    """
    stored = floored(scale, dtype).to(scale.dtype)[..., None]
    if offset is None:
        return stored, torch.full_like(stored, 1 << (bits - 1))
    return stored, (offset[..., None] / stored).round_().clamp_(0, (1 << bits) - 1)


def codes(weight: Tensor, scale: Tensor, offset: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """The code of every weight, uint8 ``[..., N, K]``; arguments as for `fake_quantize`."""
    stored, zero = grid(scale, offset, bits, dtype)
    quantized = quantize(weight.unflatten(-1, (scale.shape[-1], -1)), stored, zero, QuantScheme(bits))
    return quantized.to(torch.uint8).flatten(-2)


def fake_quantize(
    weight: Tensor, scale: Tensor, offset: Tensor | None, scheme: QuantScheme, dtype: torch.dtype, out: torch.dtype
) -> Tensor:
    """The weight rounded to its grid.

    Args:
        weight: ``[..., N, K]``, float32.
        scale: ``[..., N, G]``, float32.
        offset: ``[..., N, G]``, float32; None where the scheme is symmetric.
        scheme: Of the codes.
        dtype: What scales are stored in.
        out: Of the result.
    """
    rounded: Tensor = _FakeQuantize.apply(weight, scale, offset, scheme.bits, dtype, out)  # type: ignore[no-untyped-call]
    return rounded


def fake_quant_linear(
    x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, scheme: QuantScheme, dtype: torch.dtype
) -> Tensor:
    """``x [..., K]`` times the rounded weight ``[N, K]``, in the dtype of ``x``.

    The rounded weight is computed again in the backward pass and never kept. Other arguments as for `fake_quantize`.
    """
    output: Tensor = _FakeQuantLinear.apply(x, weight, scale, offset, scheme.bits, dtype)  # type: ignore[no-untyped-call]
    return output


def round_rows(x: Tensor) -> Tensor:
    """``x [..., K]`` rounded to symmetric INT8 with a scale for each row; the gradient passes through, since nothing is clipped."""
    rounded: Tensor = _RoundRows.apply(x)  # type: ignore[no-untyped-call]
    return rounded


class _RoundRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        codes, scale = quantize_rows(x)
        return (codes * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, offset: Tensor | None, bits: int, dtype: torch.dtype,
                out: torch.dtype) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight, scale, offset)
        ctx.bits, ctx.dtype = bits, dtype
        return _rounded(weight, scale, offset, bits, dtype, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, offset = ctx.saved_tensors
        return *_gradients(grad, weight, scale, offset, ctx.bits, ctx.dtype), None, None, None


class _FakeQuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, bits: int,
                dtype: torch.dtype) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, scale, offset)
        ctx.bits, ctx.dtype = bits, dtype
        return F.linear(x, _rounded(weight, scale, offset, bits, dtype, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, offset = ctx.saved_tensors
        to_x = to_weight = to_scale = to_offset = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ _rounded(weight, scale, offset, ctx.bits, ctx.dtype, grad.dtype)
        if any(ctx.needs_input_grad[1:4]):
            product = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            to_weight, to_scale, to_offset = _gradients(product, weight, scale, offset, ctx.bits, ctx.dtype)
        return to_x, to_weight, to_scale, to_offset, None, None


def _rounded(
    weight: Tensor, scale: Tensor, offset: Tensor | None, bits: int, dtype: torch.dtype, out: torch.dtype
) -> Tensor:
    """``[..., N, K]`` in ``out``."""
    rounded = torch.empty_like(weight, dtype=out)
    for rows in _parts(weight):
        stored, zero = grid(scale[rows], None if offset is None else offset[rows], bits, dtype)
        steps = (weight[rows].unflatten(-1, (scale.shape[-1], -1)) / stored).round_()
        rounded[rows] = steps.clamp_(-zero, (1 << bits) - 1 - zero).mul_(stored).flatten(-2)
    return rounded


def _parts(weight: Tensor) -> list[slice]:
    """Rows that stay in a cache of a CPU while much is done to them, one after the other; else all at once."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling() or not weight.numel():
        return [slice(None)]
    size = max(1, CACHED * len(weight) // weight.numel())
    return [slice(i, i + size) for i in range(0, len(weight), size)]


def _gradients(
    grad: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of weight, scale and offset from that of the rounded weight ``[..., N, K]``.

    Where a code is not clipped, the weight gets the gradient as it is, and the scale the error of rounding times it. A clipped
    weight gets none: it stands at an end of the range, which is ``-offset`` and ``(2 ** bits - 1) * scale - offset``, or
    ``-2 ** (bits - 1) * scale`` and ``(2 ** (bits - 1) - 1) * scale`` without an offset. Those of scale and offset are divided
    by ``sqrt(K / G * (2 ** bits - 1))`` as LSQ does, or they would dwarf the others where gradients are clipped by their norm.
    """
    to_weight, to_scale = torch.empty_like(weight), torch.empty_like(scale)
    to_offset = None if offset is None else torch.empty_like(offset)
    for rows in _parts(weight):
        part = (grad[rows], weight[rows], scale[rows], None if offset is None else offset[rows])
        to_weight[rows], to_scale[rows], moved = _gradients_of_part(*part, bits, dtype)
        if to_offset is not None and moved is not None:
            to_offset[rows] = moved
    return to_weight, to_scale, to_offset


def _gradients_of_part(
    grad: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    qmax = (1 << bits) - 1
    stored, zero = grid(scale, offset, bits, dtype)
    groups = weight.unflatten(-1, (scale.shape[-1], -1))
    wide = grad.to(weight.dtype).unflatten(-1, (scale.shape[-1], -1))
    ratio = groups / stored
    steps = ratio.round()
    clamped = steps.clamp(-zero, qmax - zero)
    inside = steps == clamped
    to_weight = wide * inside
    # (steps - ratio) inside, and the end of the range, in steps of the scale, elsewhere
    ends = clamped if offset is None else clamped.add_(zero)
    to_scale = (wide * torch.where(inside, steps.sub_(ratio), ends)).sum(-1)
    by = (groups.shape[-1] * qmax) ** -0.5
    to_offset = None if offset is None else (to_weight - wide).sum(-1).mul_(by)
    return to_weight.flatten(-2), to_scale.mul_(by), to_offset
