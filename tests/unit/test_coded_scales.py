"""Scales in two levels: the same numbers from fewer bytes, in files, in modules and in the layout of a kernel."""

import copy
import pickle

import pytest
import torch

from hf_quant.core.coded_scales import CodedScales
from hf_quant.core.k_quants import K_QUANTS
from hf_quant.core.layout import bytes_of, wrong_shape, wrong_values
from hf_quant.core.pieces import below, columns_of, rows_of
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.errors import SchemeError
from hf_quant.kernels import prepared_tensors
from hf_quant.nn import QuantEmbedding, QuantLinear

N, K = 48, 512
SLUGS = [*K_QUANTS, "W4A16-g16-nvfp4"]


def weight(slug: str) -> QuantizedTensor:
    scheme = QuantScheme.parse(slug)
    assert scheme.scale_bits is not None
    code, offset = (torch.randint(1, max(2, 1 << bits), (N, scheme.groups(K))).byte() for bits in scheme.scale_bits)
    unit = torch.rand(N, scheme.units(K)) * 1e-3 + 1e-3
    low = {} if scheme.symmetric else {"offset": offset, "offset_unit": unit.half()}
    code = (
        code & 63
        if scheme.codebook
        else torch.where(code == -min(0, (scheme.k_quant or K_QUANTS["Q2_K"]).scales[0]), 1, code)
    )
    coded = CodedScales(code, unit.half() if scheme.blocks else unit, **low)
    packed = torch.randint(256, (N, scheme.packed_bytes(K)), dtype=torch.uint8)
    return QuantizedTensor.from_coded(packed, coded, scheme)


@pytest.mark.parametrize("slug", SLUGS)
def test_parts_and_back(slug: str) -> None:
    made = weight(slug)
    parts = made.parts()
    assert wrong_shape(parts, made.scheme) is None and wrong_values(parts, made.scheme, K) is None
    size = sum(part.nbytes for part in parts.values())
    assert size == bytes_of((N, K), made.scheme, torch.bfloat16)
    assert size * 8 == pytest.approx(N * K * made.scheme.bits_per_weight(K))
    again = QuantizedTensor.from_parts(parts, made.scheme)
    assert torch.equal(again.dequantize(), made.dequantize())
    if made.scheme.blocks:  # what a method gives has no codes of scales yet
        bare = QuantizedTensor(made.qweight, made.scale, made.zero_point, made.scheme)
        found = QuantizedTensor.from_parts(bare.parts(), made.scheme)
        assert torch.equal(found.scale, made.scale)
        with pytest.raises(SchemeError, match="in no two levels"):
            QuantizedTensor(made.qweight, torch.rand_like(made.scale), made.zero_point, made.scheme).parts()


@pytest.mark.parametrize("slug", SLUGS)
def test_pieces(slug: str) -> None:
    made = weight(slug)
    rows = [rows_of(made, 0, 16), rows_of(made, 16, 32)]
    dense = made.dequantize()
    assert torch.equal(below(rows).dequantize(), dense)
    assert torch.equal(QuantizedTensor.from_parts(below(rows).parts(), made.scheme).dequantize(), dense)
    right = columns_of(made, 256, 256)
    assert torch.equal(QuantizedTensor.from_parts(right.parts(), made.scheme).dequantize(), dense[:, 256:])
    stack = QuantizedTensor.stack([made, made])
    assert torch.equal(QuantizedTensor.from_parts(stack.parts(), made.scheme).dequantize()[1], dense)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_layer_holds_no_more_than_its_file(slug: str) -> None:
    """Parameters and the layout of the kernel together, with kernels for this processor."""
    made = weight(slug)
    layer = QuantLinear.of(made, torch.bfloat16)
    held = [*layer.parameters(), *prepared_tensors(layer._repacked.get("weight"))]
    assert sum(part.nbytes for part in held) <= 1.1 * sum(part.nbytes for part in made.parts().values())
    stored = {name: part for name, part in layer.state_dict().items() if name in made.parts()}
    assert stored.keys() == made.parts().keys()
    assert all(torch.equal(stored[name], part) for name, part in made.parts().items())
    x = torch.randn(3, K).bfloat16()
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).float().bfloat16()):
        assert torch.equal(other(x), y) and torch.equal(other.dequantize(), made.dequantize())


def test_codes_that_no_kernel_may_meet() -> None:
    for slug, part, code, said in (
        ("W4A16-g16-nvfp4", "weight_scale_code", 0x7F, "scales are zero or not finite"),  # NaN of E4M3
        ("W4A16-g16-nvfp4", "weight_scale", 0, "not finite"),
        ("Q4_K", "weight_scale_code", 0, "scales are zero"),
        ("Q6_K", "weight_scale_code", 128, "scales are zero"),
        ("Q5_K", "weight_scale", torch.inf, "not finite"),
        ("Q2_K", "weight_zero_point", torch.nan, "not finite"),
    ):
        made = weight(slug)
        parts = {name: tensor.clone() for name, tensor in made.parts().items()}
        parts[part][3] = code
        assert said in (wrong_values(parts, made.scheme, K) or "")
        parts = made.parts()
        parts[part] = parts[part][:, :0]
        assert f"{part} has shape" in (wrong_shape(parts, made.scheme) or "")
        assert "is missing" in (wrong_shape({n: t for n, t in made.parts().items() if n != part}, made.scheme) or "")


def test_rows_of_an_embedding_have_its_type() -> None:
    made = weight("Q4_K")
    table = QuantEmbedding(N, K, made.scheme, padding_idx=None, dtype=torch.bfloat16)
    for name, part in made.parts().items():
        table._parameters[name] = torch.nn.Parameter(part, requires_grad=False)
    ids = torch.tensor([3, 0])
    assert torch.equal(table(ids), made.dequantize(torch.bfloat16)[ids])
    assert torch.equal(table.half()(ids), made.dequantize(torch.float16)[ids]) and table.compute_dtype is torch.float16
