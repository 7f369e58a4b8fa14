"""Scales and zero points are in memory once, after a kernel has laid a weight out, and come back as they were to the last bit."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_quant.core.numerics import same_bits
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import Outliers, QuantizedTensor
from hf_quant.gguf.blocks import BLOCKS, Parts
from hf_quant.gguf.codes import tensor_of
from hf_quant.jobs.convert import open_quantized
from hf_quant.kernels import prepared_tensors
from hf_quant.kernels._native import compiled
from hf_quant.methods import method
from hf_quant.nn import QuantLinear

FIXTURES = Path(__file__).parents[1] / "golden" / "fixtures"
built = pytest.mark.skipif(compiled._cpu is None, reason="not compiled")
N, K = 88, 512  # the last block of 16 rows is half empty

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SLUGS = ("W4A16-g32", "W5A16-g32", "W6A16-g64", "W8A16-g32", "W4A16-g32-asym", "W2A16-g32-asym", "W8A16-g64-asym", "W4A16-g64-asym-real",
         "W3A16-g64-asym-real", "W8A8", "W8A8-static", "W4A8-g64-asym", "W4A16-g32-o2%")  # fmt: skip


def rounded(slug: str, dtype: torch.dtype) -> QuantizedTensor:
    scheme = QuantScheme.parse(slug)
    plain = replace(scheme, outliers=0.0, activations=None, real_zero=False)
    made = method("rtn", steps=0).quantize(torch.randn(N, K) + 0.2, plain, dtype)
    zero = made.zero_point
    if scheme.real_zero and zero is not None:
        zero = zero.to(dtype) + 0.25
    index = torch.arange(N * 10).view(N, 10).remainder(K).sort(1).values.to(torch.int16)
    outliers = None
    if scheme.outliers:
        outliers = Outliers(index, torch.randn(N, 10).to(dtype))
    ranges = torch.tensor([0.04], dtype=dtype) if scheme.activations == "tensor" else None
    return replace(made, scheme=scheme, zero_point=zero, outliers=outliers, input_scale=ranges)


def of_gguf(name: str) -> tuple[QuantizedTensor, int]:
    """Random blocks, a few with a scale of zero; and their bytes in a file."""
    block = BLOCKS[name]
    codes = torch.randint(1 << block.bits, (N, K), dtype=torch.uint8)
    d = (torch.rand(N, K // 32) * 0.01).half() * torch.randint(-1, 2, (N, K // 32))
    least = None if block.center is not None else (torch.randn(N, K // 32) * 0.05).half()
    return tensor_of(Parts(codes, d, dmin=least), block), N * K // block.weights * block.size


def held(layer: QuantLinear) -> int:
    tensors = [*layer.parameters(), *prepared_tensors(layer._repacked.get("weight"))]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def proved(weight: QuantizedTensor, dtype: torch.dtype = torch.bfloat16) -> QuantLinear:
    """The layer, whose parts are what they were: as saved, saved again, copied, sent, moved and narrowed."""
    layer, parts = QuantLinear.of(weight, dtype), weight.parts()
    assert layer._repacked and "weight_scale" in parts and layer.weight_scale.numel() == 0

    def same(state: dict[str, Tensor]) -> bool:
        return state.keys() == parts.keys() and all(same_bits(state[name], part) for name, part in parts.items())

    assert same(dict(layer.state_dict())) and same(dict(layer.state_dict())), "a second time, too"
    x = torch.randn(3, K).to(dtype)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to("cpu")):
        assert same(dict(other.state_dict())) and torch.equal(other(x), y) and other.weight_scale.numel() == 0
    empty = QuantLinear(K, N, weight.scheme, bias=False, dtype=dtype, scale_dtype=weight.scale.dtype)
    empty.load_state_dict(layer.state_dict())
    empty.choose_kernel()
    assert torch.equal(empty(x), y) and same(dict(empty.state_dict()))
    layer.load_state_dict(empty.state_dict())
    assert torch.equal(layer(x), y) and torch.equal(layer.dequantize(), weight.dequantize())
    assert copy.deepcopy(layer).to("meta").weight_scale.shape == parts["weight_scale"].shape
    assert sum(parameter.numel() for name, parameter in layer.named_parameters() if "outlier" not in name) <= N * K + 1
    return layer


@built
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("slug", SLUGS)
def test_scales_are_in_memory_once(slug: str, dtype: str) -> None:
    weight = rounded(slug, FLOATS[dtype])
    if weight.scheme.activations and compiled.built() not in compiled.BYTES:
        pytest.skip("no products of bytes")
    layer = proved(weight, FLOATS[dtype])
    rows = 16 * -(-N // 16) / N  # of padding, which wider layers have not
    assert held(layer) <= 1.1 * rows * sum(part.nbytes for part in weight.parts().values())
    dense, x = weight.dequantize(torch.float64), torch.randn(5, K).to(FLOATS[dtype])
    expected = x.double() @ dense.T
    assert (layer(x) - expected).norm() / expected.norm() < 0.02


@built
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_blocks_of_gguf_take_what_their_file_takes(name: str) -> None:
    weight, file = of_gguf(name)
    layer = proved(weight)
    assert held(layer) <= 1.1 * 96 / 88 * file
    x = torch.randn(40, K).bfloat16()
    expected = x.double() @ weight.dequantize(torch.float64).T
    for m in (1, 40):
        assert (layer(x[:m]) - expected[:m]).norm() / expected[:m].norm() < 4e-3
    torch.compiler.reset()  # other tests compile such layers too, and there is a limit
    compiled_once = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled_once(x), layer(x))
    x = x.float().requires_grad_()
    grad = torch.randn(40, N)
    QuantLinear.of(weight, torch.float32)(x).backward(grad)
    torch.testing.assert_close(
        x.grad, (grad.double() @ weight.dequantize(torch.float64)).float(), rtol=1e-4, atol=1e-4
    )


@built
@pytest.mark.parametrize(
    "folder", ["bitnet", "ct-2bit-asym", "ct-5bit", "ct-4bit-asym", "hqq-4bit", "auto-round-3bit-asym"]
)
def test_checkpoints_of_others(folder: str) -> None:
    contents, file, memory = open_quantized(FIXTURES / folder), 0, 0
    for name in contents.layers:
        read = contents.read(name)
        if isinstance(read, QuantizedTensor) and read.qweight.ndim == 2:
            layer = QuantLinear.of(read, torch.bfloat16)
            file += sum(contents.checkpoint.tensors[f"{name}.{local}"].nbytes for local in contents.names[name])
            memory += held(layer)
            state = layer.state_dict()
            assert all(same_bits(state[part], tensor) for part, tensor in read.parts().items())
    assert 0 < memory <= 1.1 * file


@built
def test_what_the_layout_cannot_give_back_stays() -> None:
    """Scales in float64 are rounded for the kernel."""
    made = rounded("W4A16-g32", torch.float32)
    weight = replace(made, scale=made.scale.double() * (1 + 2**-40))
    layer = QuantLinear.of(weight, torch.float32)
    assert layer._repacked and same_bits(layer.state_dict()["weight_scale"], weight.scale)


@built
def test_a_layer_whose_codes_an_embedding_shares_keeps_its_scales() -> None:
    layer = QuantLinear.of(rounded("W4A16-g32", torch.bfloat16))
    layer._unpack()
    layer.shares_codes = True
    layer.choose_kernel()
    assert layer.weight_scale.numel() and layer.weight.numel() and layer._repacked
