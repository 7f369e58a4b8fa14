"""FP4 (E2M1) in compressed-tensors: MXFP4 with a power of two for 32 weights, NVFP4 with an E4M3 scale for 16 and one for all.

A code is a place in a table of 16 levels, so such a weight is a codebook with scales: bf16 holds powers of two, and those of NVFP4
stay in two levels (`core.coded_scales`). The OCP specification of microscaling: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_quant.core.coded_scales import CodedScales
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import FormatError
from hf_quant.formats import Layer
from hf_quant.formats._common import check_input_scale, check_scale, need

MX, NV = 32, 16  # weights that share a scale, which tells the two apart
GLOBAL = "weight_global_scale"


def fp4_layer(tensors: Mapping[str, Any], group_size: int, note: str) -> Layer:
    """A layer, from its headers: weight_packed uint8 ``[N, K / 2]``, weight_scale ``[N, K / group_size]``."""
    n, half = need(tensors, "weight_packed", (torch.uint8,), (None, None)).shape
    k = 2 * half
    scheme = QuantScheme(4, group_size, codebook="e2m1" if group_size == MX else "nvfp4")
    dtypes = (torch.uint8,) if group_size == MX else (torch.float8_e4m3fn,)
    if k % group_size or k % MX:
        raise FormatError(f"weight_packed has rows of {k}, expected a multiple of {MX}")
    need(tensors, "weight_scale", dtypes, (n, k // group_size))
    if group_size == NV:
        need(tensors, GLOBAL, (torch.float32,), (1,))
    return Layer((n, k), scheme, torch.bfloat16 if group_size == MX else torch.float32, note)


def read_fp4(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """The codes as they are, and the scales that they are multiplied by.

    Raises:
        FormatError: A tensor is misshapen, or a scale is not a number.
    """
    fp4_layer(tensors, scheme.group_size, "")
    codes, stored = tensors["weight_packed"], tensors["weight_scale"]
    if scheme.group_size == MX:
        return mxfp4(codes, stored, scheme)
    check_input_scale(GLOBAL, tensors[GLOBAL])
    return nvfp4(codes, stored, tensors[GLOBAL], scheme)


def mxfp4(codes: Tensor, stored: Tensor, scheme: QuantScheme) -> QuantizedTensor:
    """Of codes ``[N, K / 2]`` and exponents ``[N, K / 32]``."""
    return QuantizedTensor(codes.contiguous(), powers_of_two("weight_scale", stored), None, scheme)


def nvfp4(codes: Tensor, stored: Tensor, unit: Tensor, scheme: QuantScheme) -> QuantizedTensor:
    """Of codes ``[N, K / 2]`` and scales in float8 ``[N, K / 16]``, which are divided by the one of ``unit``."""
    codes = codes.contiguous()
    coded = CodedScales(stored.contiguous().view(torch.uint8), unit.expand(len(codes), 1).contiguous())
    read = QuantizedTensor.from_coded(codes, coded, scheme)
    check_scale("weight_scale", read.scale)
    return read


def powers_of_two(name: str, exponents: Tensor) -> Tensor:
    """What exponents with a bias of 127 (E8M0, uint8) stand for, in bf16.

    Raises:
        FormatError: One of them says NaN.
    """
    if bool((exponents == 255).any()):
        raise FormatError(f"{name}: 255 is no exponent but NaN")
    return torch.exp2(exponents.float() - 127).bfloat16()
