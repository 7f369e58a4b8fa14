"""Parts of layers and layers joined: the arithmetic of tensor parallelism and of fused projections."""

import pytest
import torch

from hf_quant import QuantLinear
from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import CheckpointError, PlanError, SchemeError
from hf_quant.methods import method

N, K = 12, 256
SCHEMES = [
    "W2A16-g32", "W3A16-g64-asym", "W4A16-g-1", "W8A16-g32-asym", "W3A16-g128-o1%", "W2A16-g32-asym-o5%", "W4A16-g64-o2%-columns",
    "W8A8-o0.5%-columns", "W4A8-g32",
]  # fmt: skip


def layer(slug: str, seed: int = 0) -> QuantLinear:
    torch.manual_seed(seed)
    scheme = QuantScheme.parse(slug)
    weight = torch.randn(N, K)
    weight[:, 3] *= 20
    weight[0, -9:] *= 20  # the halves have different numbers of outliers
    if not scheme.needs_ranges:
        return QuantLinear.from_weight(weight, slug)
    return QuantLinear.of(method("rtn").quantize(weight, scheme, torch.float32))


@pytest.mark.parametrize("slug", SCHEMES)
def test_parts_hold_what_the_whole_holds(slug: str) -> None:
    whole = layer(slug)
    dense, x = whole.dequantize(), torch.randn(5, K)
    x[:, 3] = 0.1
    for at in (0, 4, 8):
        assert torch.equal(whole.narrowed(0, at, 4).dequantize(), dense[at : at + 4])
    parts = [whole.narrowed(1, at, 128) for at in (0, 128)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts], 1), dense)
    summed = parts[0](x[:, :128]) + parts[1](x[:, 128:])
    error = (summed - x @ dense.T).norm() / (x @ dense.T).norm()
    assert error < (0.02 if whole.scheme.activations else 2e-3)
    below = QuantLinear.joined([layer(slug), layer(slug, seed=1)])
    assert (below is None) == whole.scheme.outlier_columns
    if below is not None:
        assert torch.equal(below.dequantize(), torch.cat([dense, layer(slug, seed=1).dequantize()]))
    tensors = whole.quantized_weight().parts()
    assert torch.equal(QuantLinear.from_tensors(tensors, slug)(x), whole(x))


def test_what_cannot_be_taken_apart_is_refused() -> None:
    whole = layer("W4A16-g128")
    with pytest.raises(SchemeError, match="columns 64 to 128 of 256 cut what W4A16-g128 holds in 128 columns"):
        whole.narrowed(1, 64, 64)
    with pytest.raises(SchemeError, match="rows 8 to 16: there are 12"):
        whole.narrowed(0, 8, 8)
    for name, slug in (("gptq", "W4A16-g128"), ("rtn", "W8A8-static")):
        with pytest.raises(PlanError, match="no inputs to look at"):
            QuantLinear.from_weight(torch.randn(N, K), slug, method=name)
    assert QuantLinear.joined([whole, layer("W3A16-g128")]) is None
    tensors = whole.quantized_weight().parts()
    with pytest.raises(CheckpointError, match="weight_zero_point is missing"):
        QuantLinear.from_tensors(tensors, "W4A16-g128-asym")
    tensors["weight_scale"] = torch.full_like(tensors["weight_scale"], torch.nan)
    with pytest.raises(CheckpointError, match="weight_scale: 24 scales are zero or not finite"):
        QuantLinear.from_tensors(tensors, "W4A16-g128")


@pytest.mark.parametrize("caller", ["torch.distributed.fsdp._fully_shard._fsdp_param", "accelerate.hooks"])
def test_who_shares_out_parameters_sees_the_codes(caller: str) -> None:
    whole = layer("W4A16-g128")
    assert eval("whole.weight", {"__name__": caller, "whole": whole}) is whole._parameters["weight"]
    assert eval("whole.weight", {"__name__": "somebody", "whole": whole}).is_floating_point()
