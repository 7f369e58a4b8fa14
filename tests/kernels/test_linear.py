"""`QuantLinear` with a kernel that lays the codes out anew."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.formats import format_named
from hf_quant.methods import method
from hf_quant.nn import QuantLinear
from hf_quant.nn._weight import frozen


def layer(slug: str = "W4A16-g32", n: int = 80, k: int = 64) -> tuple[QuantLinear, QuantizedTensor]:
    scheme = QuantScheme.parse(slug)
    weight = method("rtn").quantize(torch.randn(n, k), scheme, torch.bfloat16)
    made = QuantLinear(k, n, scheme, bias=True, dtype=torch.bfloat16)
    for name, tensor in format_named("native").write(weight).items():
        setattr(made, name, frozen(tensor))
    made.bias = frozen(torch.randn(n).bfloat16())
    made.choose_kernel()
    return made, weight


@pytest.mark.parametrize("slug", ["W4A16-g32", "W4A16-g32-asym", "W8A16-g-1", "W3A16-g32"])
def test_one_copy_of_the_codes_and_a_portable_state_dict(slug: str) -> None:
    made, weight = layer(slug)
    if made._repacked:
        assert made.weight.numel() == 0
    state = made.state_dict()
    for name, tensor in format_named("native").write(weight).items():
        assert torch.equal(state[name], tensor)
    fresh = QuantLinear(64, 80, made.scheme, bias=True, dtype=torch.bfloat16)
    fresh.load_state_dict(state)
    x = torch.randn(3, 64).bfloat16()
    fresh.choose_kernel()
    assert torch.equal(fresh(x), made(x))
    made.load_state_dict(state)  # into a layer whose kernel was chosen
    assert torch.equal(fresh(x), made(x)) and type(fresh._backend) is type(made._backend)


def test_copies_and_casts() -> None:
    made, weight = layer()
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    made.to(torch.float32)
    assert made.compute_dtype is torch.float32 and made.weight_scale.dtype is torch.float32
    assert torch.equal(made.quantized_weight().qweight, weight.qweight)
    assert made(x.float()).dtype is torch.float32


def test_scales_finer_than_what_the_layer_computes_in_stay_so() -> None:
    scheme = QuantScheme(4, 32, codebook="nf4")
    made = QuantLinear(64, 80, scheme, bias=True, dtype=torch.bfloat16, scale_dtype=torch.float32)
    made.weight = frozen(torch.randint(256, (80, 32), dtype=torch.uint8))
    made.weight_scale = frozen(torch.rand(80, 2))
    made.bias = frozen(torch.randn(80).bfloat16())
    before = made.dequantize()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        made.to(dtype)
        assert (made.compute_dtype, made.bias.dtype, made.weight_scale.dtype) == (dtype, dtype, torch.float32)
        assert torch.equal(made.dequantize(), before) and made(torch.randn(3, 64, dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("asym", ["", "-asym"])
def test_permuted_columns(asym: str) -> None:
    made, weight = layer(f"W4A16-g32{asym}")
    order = torch.randperm(64)
    mixed = QuantLinear(64, 80, QuantScheme.parse(f"W4A16-g32{asym}-perm"), bias=True, dtype=torch.bfloat16)
    mixed.load_state_dict(made.state_dict() | {"weight_perm": order[None].int()})
    mixed.choose_kernel()
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(mixed(x[:, order.argsort()]), made(x))
    assert torch.equal(mixed.dequantize()[:, order], weight.dequantize())


@pytest.mark.parametrize("m", [3, 200])
def test_compiles_into_one_graph(m: int) -> None:
    made, _ = layer()
    x = torch.randn(m, 64).bfloat16()
    with torch.no_grad():
        expected = made(x)
        got = torch.compile(made, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected)


class Doubled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


@pytest.mark.parametrize("conv1d", [False, True])
def test_a_parametrized_weight_is_multiplied_with(conv1d: bool) -> None:
    made = QuantLinear.from_weight(torch.randn(48, 64), "W4A16-g32")
    made.conv1d = conv1d
    made.register_parameter("bias", frozen(torch.ones(48)))
    x = torch.randn(3, 64)
    before = made(x)
    parametrize.register_parametrization(made, "weight", Doubled())
    torch.testing.assert_close(made(x), 2 * before - 1, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.compile(made, backend="eager")(x), made(x))
    parametrize.remove_parametrizations(made, "weight", leave_parametrized=False)
    assert torch.equal(made(x), before)
