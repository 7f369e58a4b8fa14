"""The layout of codes for tensor cores, and the PTX that unpacks it, run instruction by instruction."""

import re

import pytest
import torch

from hf_quant.core.numerics import levels
from hf_quant.core.packing import pack
from hf_quant.core.scheme import BITS
from hf_quant.kernels._triton import naive, planar, tiles
from hf_quant.kernels._triton.planar import fields, from_planes, plane, positions, to_planes, unpacking


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "size"), [(32, 16), (96, 32), (416, 64), (1024, 64)])
def test_the_layout_is_undone(bits: int, k: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planar, "CHUNK", 3 * k)  # three rows at a time
    codes = torch.randint(1 << bits, (2, 7, k))
    packed = to_planes(pack(codes, bits), bits, size)
    assert packed.dtype is torch.int16 and packed.shape == (2, 7, planar.words(k, bits, size))
    assert torch.equal(from_planes(packed, bits, size, k), pack(codes, bits))
    for matrix, expected in zip(packed, codes, strict=True):
        assert torch.equal(naive.codes(matrix, bits, size, k), expected)


def run(ptx: str, operand: int, count: int, dtype: torch.dtype) -> list[int]:
    """The registers ``$0`` to ``$count - 1`` after the instructions; only those that `unpacking` uses are known."""
    registers = {f"${count}": operand}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def floats(name: str) -> torch.Tensor:
        halves = [value(name) & 0xFFFF, value(name) >> 16]
        return torch.tensor([h - (h >> 15 << 16) for h in halves], dtype=torch.int16).view(dtype).double()

    for line in re.split(r"[;\n]", ptx.strip()[1:-1]):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        op, rest = line.split(" ", 1)
        to, *args = [part.strip() for part in rest.split(",")]
        if op == "mov.b32":
            made = value(args[0])
        elif op == "shr.u32":
            made = value(args[0]) >> value(args[1])
        elif op == "and.b32":
            made = value(args[0]) & value(args[1])
        elif op == "lop3.b32":
            assert args[3] == "0xEA"  # (a & b) | c
            made = value(args[0]) & value(args[1]) | value(args[2])
        elif op == "prmt.b32":
            both, picks = value(args[0]) | value(args[1]) << 32, [value(args[2]) >> 4 * i & 15 for i in range(4)]
            assert max(picks) < 8  # 8 and more copy a sign
            made = sum((both >> 8 * pick & 255) << 8 * i for i, pick in enumerate(picks))
        else:
            assert op == "fma.rn.bf16x2", op
            exact = floats(args[0]) * floats(args[1]) + floats(args[2])
            halves = exact.to(dtype).view(torch.int16).tolist()
            made = (halves[0] & 0xFFFF) | (halves[1] & 0xFFFF) << 16
        registers[to] = made & 0xFFFFFFFF
    return [registers[f"${j}"] for j in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*BITS, "nf4", "fp4"])
def test_the_instructions_unpack(kind: int | str, dtype: torch.dtype) -> None:
    bits = kind if isinstance(kind, int) else 4
    book = None if isinstance(kind, int) else levels(kind, torch.device("cpu"))
    ptx, operands = unpacking(bits, dtype, None if book is None else tuple(book.tolist()))
    assert operands.count("=&r") == fields(bits) == operands.count(",")
    for _ in range(40):
        codes = torch.randint(1 << bits, (1, 2 * fields(bits)))  # planes of two columns: one register of two words
        lanes = codes.view(fields(bits), 2)
        words = [sum(int(lanes[j, i]) << bits * j for j in range(fields(bits))) for i in range(2)]
        spare = torch.randint(2, (2,)).tolist() if bits == 3 else [0, 0]  # the sixteenth bit of five codes of three
        words = [word | top << 15 for word, top in zip(words, spare, strict=True)]
        made = run(ptx, words[0] | words[1] << 16, fields(bits), dtype)
        for j, register in enumerate(made):
            halves = torch.tensor([register & 0xFFFF, register >> 16]).to(torch.int16).view(dtype).double()
            if book is not None:
                expected = book.to(dtype)[lanes[j]].double()
            elif bits == 8 and dtype is torch.bfloat16:
                expected = lanes[j].double() - 128
            else:
                base = 128 if dtype is torch.bfloat16 else 1024
                expected = base + lanes[j].double() * 2 ** positions(bits, dtype)[j][1]
            assert torch.equal(halves, expected), (j, lanes[j])


def test_planes_keep_to_groups() -> None:
    assert [plane(group, 4) for group in (0, 16, 32, 64, 128)] == [64, 16, 32, 64, 64]
    assert [plane(group, 2) for group in (0, 16, 128)] == [32, 16, 32]


def test_tiles_for_every_gpu(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    tiles.forget()
    cpu = torch.device("cpu")
    for kind, table in tiles.tables().items():
        assert list(map(int, table["tiles"])) == sorted(map(int, table["tiles"])), kind
        for rows, numbers in table["tiles"].items():
            assert tiles.Tile(*numbers).block_m <= max(16, int(rows)), kind
    found = tiles.tile_for(cpu, 4, 1, 4096, 4096, 16)
    assert found is not None and found.split_k >= 1
    assert tiles.tile_for(cpu, 4, 100_000, 4096, 4096, 16) is None
    own = {"tiles": {"16": [16, 128, 4, 4, 2]}, "dense": 99}
    path = tiles.tuned_path(cpu)
    path.parent.mkdir(parents=True)
    import json

    path.write_text(json.dumps({tiles.key(4, 4096, 4096): own}))
    tiles.forget()
    assert tiles.tile_for(cpu, 4, 1, 4096, 4096, 16) == tiles.Tile(16, 128, 4, 4, 2)
    assert tiles.tile_for(cpu, 4, 100, 4096, 4096, 16) is None
    assert tiles.tile_for(cpu, 8, 1, 4096, 4096, 32) != tiles.Tile(16, 128, 4, 4, 2)
    path.write_text("{")  # a damaged cache is as good as none
    tiles.forget()
    assert tiles.tile_for(cpu, 4, 1, 4096, 4096, 16) == found
    tiles.forget()


def test_tiles_of_experts() -> None:
    cpu = torch.device("cpu")
    one, eight = (tiles.tile_for(cpu, 4, 4096, 4096, 4096, 16, experts) for experts in (1, 8))
    assert one is None and eight is not None and eight.block_m == 128  # 512 rows each
    assert tiles.tile_for(cpu, 4, 4097, 4096, 4096, 16, 8) is None
    scattered = tiles.tile_for(cpu, 4, 4096, 4096, 4096, 16, 8, scattered=True)  # or their epilogue spills registers
    assert scattered is not None and scattered.block_m == 64
    for rows in (1, 8, 64):  # as for the rows of one
        found, alone = tiles.tile_for(cpu, 4, rows, 4096, 4096, 16, 64), tiles.tile_for(cpu, 4, 1, 4096, 4096, 16)
        assert found is not None and alone is not None and found.block_m == alone.block_m


def test_columns_are_shared_by_as_many_as_are_idle() -> None:
    tile = tiles.Tile(8, 64, 2, 4)
    assert tiles.parts(tile, 1, 4096, 16, 132) == 8  # 64 tiles: 512 programs for 132 processors
    assert tiles.parts(tile, 1, 65536, 16, 132) == 1
    assert tiles.parts(tile, 1, 64, 2, 132) == 1  # nothing to share
