"""Packing: every width, every code, and the bit order that other software relies on."""

import pytest
import torch

from hf_quant.core.packing import pack, unpack

WIDTHS = range(1, 9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", WIDTHS)
def test_round_trip_leaves_the_codes_alone(bits: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 1 << bits, (2, 3, 64)).to(dtype)
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 8 * bits)
    assert torch.equal(codes, before)
    assert torch.equal(unpack(packed, bits), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
def test_bits_are_little_endian(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (64,)).tolist()
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    assert bytes(pack(torch.tensor(codes), bits).tolist()) == number.to_bytes(8 * bits, "little")


def test_literal_bytes() -> None:
    codes = torch.arange(8)
    assert bytes(pack(codes, 4).tolist()).hex() == "10325476"
    assert bytes(pack(codes, 3).tolist()).hex() == "88c6fa"
    assert bytes(pack(codes % 4, 2).tolist()).hex() == "e4e4"
    assert bytes(pack(codes, 8).tolist()).hex() == "0001020304050607"


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_that_are_not_contiguous(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (32, 5)).T
    assert torch.equal(unpack(pack(codes, bits), bits), codes.to(torch.uint8))
