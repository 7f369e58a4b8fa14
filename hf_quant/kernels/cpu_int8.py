"""W8A8 on CPUs through oneDNN's int8 products, where ours were not compiled: rows are rounded block by block in the caches.

``onednn::qlinear_pointwise`` knows one scale for all activations. Called with a scale of one and unsigned codes around 128
it gives ``sum(q * w) * scale_w``, exact but for the last rounding, and each row is multiplied by its own scale afterwards.
(Signed codes would end in a plain loop.) The packed weight depends on the instruction set and never leaves this process;
`restore` reads it back. Outlier columns are zeros here: their weights are multiplied in floating point beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.core.private_torch import cpu_has, may_skip_dispatcher
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels._interface import LinearSpec
from hf_quant.kernels._shared.blocks import BLOCK, Rounding, compute_dtype, flat, rounding
from hf_quant.kernels._shared.ops import implements

ROWS, PART = 512, 32  # multiplied together; rounded together, 512 kB of float32 at 4096 columns
TINY = torch.finfo(torch.float32).tiny * 127


@lru_cache
@torch.inference_mode(False)
def _nothing(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int32)


@implements("cpu_int8_linear")
def cpu_int8_linear(
    x: Tensor, packed: Tensor, scale: Tensor, columns: Tensor | None, input_scale: Tensor | None
) -> Tensor:
    """``x [M, K]`` rounded to int8, times int8 codes: ``[M, N]``.

    Args:
        x: ``[M, K]``.
        packed: What ``qlinear_prepack`` makes of int8 ``[N, K]``; or those codes themselves, packed at every call.
        scale: float32 ``[N]``.
        columns: int16 or int32 ``[C]``, left out; None for none.
        input_scale: ``[1]``, or None for one of each row.
    """
    return _product(x, packed, scale, columns, input_scale)


def _product(x: Tensor, packed: Tensor, scale: Tensor, columns: Tensor | None, input_scale: Tensor | None) -> Tensor:
    packed = packed if packed.is_mkldnn else _pack(packed)
    zero = _nothing(scale.shape[0])
    y = x.new_empty(x.shape[0], scale.shape[0])
    for rows, output in zip(x.split(ROWS), y.split(ROWS), strict=True):
        codes, row_scale = _rounded(rows, columns, input_scale)
        product = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        output.copy_(product.mul_(row_scale))
    return y


def _rounded(rows: Tensor, columns: Tensor | None, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """uint8 codes around 128 and the float32 scale ``[M, 1]``; the latter is NaN where a row is not finite."""
    codes = rows.new_empty(rows.shape, dtype=torch.uint8)
    scale = rows.new_empty(rows.shape[0], 1, dtype=torch.float32)
    index = None if columns is None else columns.long()
    for part, code, row_scale in zip(rows.split(PART), codes.split(PART), scale.split(PART), strict=True):
        wide = part.to(torch.float32, copy=True)
        if index is not None:
            wide.index_fill_(1, index, 0)
        if input_scale is None:
            row_scale.copy_(wide.abs().amax(-1, keepdim=True).clamp_(min=TINY).div_(127))
            wide.mul_(row_scale.reciprocal()).add_(128.5)  # what follows cuts off: together that rounds
        else:
            row_scale.copy_(wide.sum(-1, keepdim=True).mul_(0).add_(input_scale))
            wide.mul_(row_scale.reciprocal()).add_(128.5).clamp_(1, 255)
        code.copy_(wide)
    return codes, scale


def _pack(codes: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(codes, None)


@implements("cpu_int8_linear_backward")
def cpu_int8_linear_backward(grad: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """``grad [M, N]`` times W: ``[M, K]``, as if activations were not rounded."""
    codes = packed.to_dense() if packed.is_mkldnn else packed.T  # [K, N]
    dtype = compute_dtype(grad)
    wide = (grad.to(dtype) * scale.to(dtype)) if dtype is torch.float64 else (grad.float() * scale).to(dtype)
    step = max(1, BLOCK // scale.shape[0])
    return torch.cat([F.linear(wide, part.to(dtype)) for part in codes.split(step)], 1).to(grad.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, _, _ = inputs
    ctx.packed = packed  # no storage to save
    ctx.save_for_backward(scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return cpu_int8_linear_backward(grad, ctx.packed, ctx.saved_tensors[0]), None, None, None, None


cpu_int8_linear.register_autograd(_backward, setup_context=_save)


@lru_cache
def _why_not_here() -> str | None:
    """Why this processor or build cannot."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return "this build of torch has no oneDNN"
    if not cpu_has("avx512_vnni", "vnni", "amx_tile"):
        return "the processor has no int8 products (VNNI): sums of two would overflow 16 bits"
    return None


@dataclass(frozen=True, slots=True)
class OneDnnWeight:
    """A weight ``[N, K]`` in the layout of oneDNN.

    Attributes:
        packed: int8 ``[K, N]``, what ``qlinear_prepack`` returns.
        scale: float32 ``[N]``.
        rounding: How the activations are rounded.
    """

    packed: Tensor
    scale: Tensor
    rounding: Rounding


class CpuInt8:
    """8 bits without zero points, one scale a row."""

    priority: ClassVar[int] = 40
    repacks: ClassVar[bool] = True
    int8_activations: ClassVar[bool] = True

    def why_not(self, spec: LinearSpec) -> str | None:
        scheme = spec.scheme
        if spec.device != "cpu":
            return f"needs a CPU, got {spec.device}"
        if scheme.bits != 8 or not scheme.symmetric or scheme.groups(spec.in_features) != 1:
            return f"8 bits without zero points and one scale a row only, not {scheme}"
        if scheme.activations == "threshold":
            return "one scale a row or for all, no columns chosen on the way"
        if spec.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"rounds in float32, too coarse for {spec.dtype}"
        return _why_not_here()

    def prepare(self, weight: QuantizedTensor, spec: LinearSpec) -> OneDnnWeight:
        codes = (weight.qweight ^ 0x80).view(torch.int8)  # 0..255 to -128..127
        return OneDnnWeight(_pack(codes), weight.scale[:, 0].float().contiguous(), rounding(weight))

    def restore(self, prepared: OneDnnWeight, spec: LinearSpec) -> Tensor:
        return prepared.packed.to_dense().T.contiguous().view(torch.uint8) ^ 0x80

    def scales(self, prepared: OneDnnWeight, spec: LinearSpec) -> dict[str, Tensor]:
        """See `LinearBackend`."""
        return {"weight_scale": prepared.scale[:, None]}

    def linear(self, x: Tensor, prepared: OneDnnWeight, spec: LinearSpec) -> Tensor:
        grid = prepared.rounding
        product = _product if may_skip_dispatcher(x) and x.is_floating_point() else cpu_int8_linear
        y = product(flat(x, spec.in_features), prepared.packed, prepared.scale, grid.columns, grid.scale)
        return y.reshape(*x.shape[:-1], spec.out_features)


BACKEND = CpuInt8
