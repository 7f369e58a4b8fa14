"""`QuantLinear` with a kernel that lays the codes out anew."""

import copy

import pytest
import torch

from hf_quant.formats import format_named
from hf_quant.methods import method
from hf_quant.nn import QuantLinear
from hf_quant.nn._weight import frozen
from hf_quant.scheme import QuantScheme
from hf_quant.tensor import QuantizedTensor


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


@pytest.mark.parametrize("m", [3, 200])
def test_compiles_into_one_graph(m: int) -> None:
    made, _ = layer()
    x = torch.randn(m, 64).bfloat16()
    with torch.no_grad():
        expected = made(x)
        got = torch.compile(made, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected)
