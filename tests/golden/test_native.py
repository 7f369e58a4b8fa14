"""The bytes of the native format: a checkpoint written today must mean the same for ever."""

import pytest
import torch

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.formats import format_named

CODES = {  # of i * 7 + 3 + i // 32 for i in 0..63, cut to that many bits; two rows of 32
    2: "1b1b1b1b1b1b1b1b6c6c6c6c6c6c6c6c",
    3: "5370975370975370975370979c82bb9c82bb9c82bb9c82bb",
    4: "a3816f4d2b09e7c5a3816f4d2b09e7c5b492705e3c1af8d6b492705e3c1af8d6",
    8: "030a11181f262d343b424950575e656c737a81888f969da4abb2b9c0c7ced5dc"
    "e4ebf2f900070e151c232a31383f464d545b626970777e858c939aa1a8afb6bd",
}
SHAPES = {2: (2, 8), 3: (2, 12), 4: (2, 16), 8: (2, 8, 4)}
ZEROS = {2: "0102", 3: "0106", 4: "010e", 8: "01fe"}


def bytes_of(tensor: torch.Tensor) -> str:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()).hex()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", CODES)
def test_bytes(bits: int, symmetric: bool) -> None:
    i = torch.arange(64).reshape(2, 32)
    zero = torch.tensor([[1], [2**bits - 2]])
    scheme = QuantScheme(bits, -1, symmetric)
    tensor = QuantizedTensor.from_codes((i * 7 + 3 + i // 32) % 2**bits, torch.tensor([[0.5], [2.0]]), zero, scheme)
    written = format_named("native").write(tensor)
    assert {name: bytes_of(t) for name, t in written.items()} == {
        "weight": CODES[bits],
        "weight_scale": "0000003f00000040",
    } | ({} if symmetric else {"weight_zero_point": ZEROS[bits]})
    assert tuple(written["weight"].shape) == SHAPES[bits]
    first = (3 - (2 ** (bits - 1) if symmetric else 1)) * 0.5
    assert float(format_named("native").read(written, scheme).dequantize()[0, 0]) == first


@pytest.mark.parametrize(("bits", "packed"), [(2, "16"), (3, "4e01"), (4, "1e05"), (8, "0e0105")])
def test_zero_points_are_packed_row_by_row(bits: int, packed: str) -> None:
    zero = torch.tensor([[14, 1, 5]]) % 2**bits
    scheme = QuantScheme(bits, 32, symmetric=False)
    tensor = QuantizedTensor.from_codes(torch.zeros(1, 96, dtype=torch.int64), torch.ones(1, 3), zero, scheme)
    written = format_named("native").write(tensor)
    assert bytes_of(written["weight_zero_point"]) == packed
    assert format_named("native").read(written, scheme).zeros().tolist() == zero.tolist()
