"""KL on a model that is certain of its tokens, beside a script that shares no code with the evaluation."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.yardsticks import make

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no benchmarks beside the tests")
def test_kl_of_a_peaked_model_is_that_of_full_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kl_exact

    monkeypatch.setattr(kl_exact, "TOKENS", 1500)
    folder = make("peaked", tmp_path / "peaked")
    ids = AutoTokenizer.from_pretrained(folder)((folder / "heldout.txt").read_text()).input_ids[:64]
    with torch.no_grad():
        p = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits.softmax(-1)
    assert p.shape[-1] > 192 and p.amax(-1).median() > 1 - 3e-7, "the tail is sampled, and weighs next to nothing"
    found = kl_exact.rows(folder, 64, tmp_path / "cache")
    assert [row["bits"] for row in found] == [8, 4, 3, 2]
    for row in found:
        assert row["measured"] == pytest.approx(row["exact"], rel=0.01), row
    sys.modules.pop("kl_exact")
