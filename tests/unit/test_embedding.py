"""Tables of embeddings whose rows are codes."""

import pytest
import torch
from torch import Tensor

from hf_quant.core import tensor
from hf_quant.core.scheme import QuantScheme
from hf_quant.formats import format_named
from hf_quant.methods import method
from hf_quant.nn import QuantEmbedding
from hf_quant.nn._weight import frozen

ROWS, WIDTH = 50, 96
KINDS = [f"W{bits}A16-g32{kind}" for bits in (3, 4, 8) for kind in ("", "-asym", "-asym-o3%", "-asym-o3%-columns")]


def table(slug: str) -> QuantEmbedding:
    scheme = QuantScheme.parse(slug)
    made = QuantEmbedding(ROWS, WIDTH, scheme, padding_idx=None, dtype=torch.bfloat16)
    weight = method("rtn", steps=0).quantize(torch.randn(ROWS, WIDTH), scheme, torch.bfloat16)
    for name, part in format_named("native").write(weight).items():
        setattr(made, name, frozen(part))
    return made


@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (0,)])
@pytest.mark.parametrize("slug", KINDS)
def test_a_lookup_gives_the_rows_of_the_float_table(slug: str, shape: tuple[int, ...]) -> None:
    made, ids = table(slug), torch.randint(ROWS, shape)
    assert torch.equal(made(ids), made.dequantize()[ids])
    assert torch.equal(made(ids.int()), made(ids))


@pytest.mark.parametrize("slug", ["W4A16-g32", "W8A16-g32-asym-o3%"])
@pytest.mark.parametrize("ids", [[[-1]], [[0, -ROWS]], [[ROWS]], [[2**40]], [[True, False]], [[0.0]]])
def test_what_is_no_row_raises_as_a_float_table_does(slug: str, ids: list[list[float]]) -> None:
    made = table(slug)
    plain = torch.nn.Embedding(ROWS, WIDTH)
    for module in (plain, made):
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|[Ii]nt"):
            module(torch.tensor(ids))


def test_a_lookup_unpacks_no_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack, seen = tensor.unpack_short, []

    def watched(packed: Tensor, bits: int, count: int) -> Tensor:
        seen.append(packed.shape[:-1])
        return unpack(packed, bits, count)

    monkeypatch.setattr(tensor, "unpack_short", watched)
    table("W4A16-g32-asym")(torch.tensor([[3, 1, 3]]))
    assert seen == [(1, 3)]
