"""Several processes on one machine, joined by gloo; the real launcher is tested in ``tests/e2e/test_streaming.py``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_quant import HfQuantConfig
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.core.stats import InputStats
from hf_quant.data.calibration import Calibration
from hf_quant.hf.calibrate_shards import Settings, quantize_streaming
from hf_quant.solve.block import Block
from hf_quant.solve.inputs import reduce
from hf_quant.solve.ranks import Ranks
from tests.processes import together

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def test_values_come_from_every_rank(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Any:
        ranks.barrier()
        ranks.barrier(patient=True)
        mine = torch.full((2,), float(ranks.rank))
        every = ranks.every([mine] * ranks.rank)
        return (
            ranks.total(ranks.rank, 1),
            [len(each) for each in every],
            ranks.shared(mine if ranks.rank == 1 else None, 1),
        )

    for made in together(work, tmp_path):
        assert isinstance(made, tuple), made
        assert made[:2] == ([3.0, 3.0], [0, 1, 2]) and made[2].tolist() == [1.0, 1.0]


def test_tensors_come_to_the_device_that_is_named(tmp_path: Path) -> None:
    """The meta device stands for a GPU that this rank has and the others do not: nothing is left where it came from."""

    def work(ranks: Ranks) -> Any:
        return [
            [str(x.device) for x in each] for each in ranks.every([torch.zeros(1)], "meta" if ranks.rank else "cpu")
        ]

    assert together(work, tmp_path, 2) == [[["cpu"], ["cpu"]], [["meta"], ["meta"]]]


def test_statistics_of_ranks_that_saw_nothing(tmp_path: Path) -> None:
    """What three ranks saw together, one of them nothing, is what one would have seen."""
    rows = torch.randn(2, 8, 4)

    def see(stats: InputStats, part: int) -> None:
        stats.update(rows[part], rows[part] + 1, held=part, sampled=1)

    def work(ranks: Ranks) -> Any:
        stats = InputStats.empty(4, drift=True)
        if ranks.rank < 2:
            see(stats, ranks.rank)
        reduce(stats, ranks)
        return stats

    alone = InputStats.empty(4, drift=True)
    for part in range(2):
        see(alone, part)
    for stats in together(work, tmp_path):
        assert isinstance(stats, InputStats), stats
        torch.testing.assert_close([stats.gram, stats.drift], [alone.gram, alone.drift])
        assert torch.equal(stats.peak, alone.peak) and torch.equal(torch.cat(stats.sample), torch.cat(alone.sample))
        assert (stats.rows, stats.drift_rows, len(stats.held)) == (alone.rows, alone.drift_rows, 1)


def test_a_rank_that_does_not_answer_ends_the_others(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Any:
        return "ended" if ranks.rank == 1 else ranks.every(ranks.rank)

    made = together(work, tmp_path, 2, seconds=2)
    assert "rank 0 of 2: the other processes do not answer" in made[0] and made[1] == "ended"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder := tmp_path_factory.mktemp("base"))
    return folder


@pytest.mark.parametrize(
    ("scheme", "method"), [("W3A16-g32", "awq"), ("W3A16-g32", "learned"), ("W8A8", "smoothquant+gptq")]
)
def test_fewer_batches_than_ranks(scheme: str, method: str, source: Path, tmp_path: Path) -> None:
    """Two batches for three processes, with transforms that look at outputs: all look at the same ones."""
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    looked, sample = [], Block.sample

    def watched(self: Block, batch: Any, *args: Any) -> torch.Tensor:
        looked.append(batch.states.double().sum().item())
        return sample(self, batch, *args)

    def work(ranks: Ranks) -> Any:
        out = tmp_path / f"{ranks.world}"
        if ranks.first:
            out.mkdir()
        Block.sample = watched  # type: ignore[method-assign]
        config, data = HfQuantConfig(scheme, method=method), Calibration(ids, "ids", [])
        quantize_streaming(source, config, data, out.with_suffix(".work"), out, Settings(print, ranks=ranks))
        return set(looked)

    first, *others = together(work, tmp_path)
    assert isinstance(first, set), first
    assert len(first) == 2 and all(other == first for other in others)
    (alone,) = together(work, tmp_path / "alone", 1) if (tmp_path / "alone").mkdir() is None else ()
    assert isinstance(alone, set), alone
    one, three = Checkpoint.open(tmp_path / "1"), Checkpoint.open(tmp_path / "3")
    codes = [name for name, tensor in one.tensors.items() if tensor.dtype in ("U8", "I8", "I32")]
    same = [(one.read(name) == three.read(name)).double().mean().item() for name in codes]
    assert one.tensors.keys() == three.tensors.keys() and len(codes) == 14 and min(same) > 0.9
