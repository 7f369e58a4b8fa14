"""What is promised of the model under examples/, on a part of its held-out text."""

import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quant import HfQuantConfig, load
from hf_quant.data.text import read_text
from hf_quant.evaluation.measure import evaluate
from hf_quant.evaluation.reference import Reference
from hf_quant.evaluation.results import Quality
from hf_quant.evaluation.yardstick import Base
from hf_quant.methods import rtn

MODEL = Path(__file__).parents[2] / "examples" / "ref-llama-16m"
pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="no examples beside the tests")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = read_text(MODEL / "heldout.txt")
    return Base(str(MODEL)).reference(
        tokenizer, text, context=256, max_tokens=6144, noise=False, cache=tmp_path_factory.mktemp("cache")
    )


def measured(reference: Reference, scheme: str) -> Quality:
    model = load(str(MODEL), quantization_config=HfQuantConfig(scheme), dtype=torch.float32).eval()
    return evaluate(model, reference)


@pytest.fixture(scope="module")
def rungs(reference: Reference) -> Iterator[dict[int, Quality]]:
    yield {bits: measured(reference, f"W{bits}A16-g128") for bits in (8, 4, 3, 2)}


def kl(quality: Quality) -> float:
    return quality.metrics["kl"].value


def test_the_ladder_is_monotone(rungs: dict[int, Quality]) -> None:
    assert kl(rungs[8]) < kl(rungs[4]) < kl(rungs[3]) < kl(rungs[2])
    assert abs(rungs[8].metrics["perplexity_ratio"].value - 1) < 0.001


def test_scale_search_beats_min_max(
    reference: Reference, rungs: dict[int, Quality], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtn, "METHOD", lambda: rtn.RTN(steps=0))
    assert kl(rungs[4]) < 0.95 * kl(measured(reference, "W4A16-g128"))


def test_the_cache_against_full_logits(reference: Reference, rungs: dict[int, Quality]) -> None:
    """KL within the error that is stated, perplexity that of a plain transformers loop."""
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model: Any = load(str(MODEL), quantization_config=HfQuantConfig("W4A16-g128"), dtype=torch.float32)
    divergence, nll, base_nll = [], [], []
    with torch.no_grad():
        for row in reference.windows.ids:
            log_p, log_q = (each(row[None]).logits[0, :-1].double().log_softmax(-1) for each in (base, model))
            divergence.append((log_p.exp() * (log_p - log_q)).sum(-1))
            nll.append(model(row[None], labels=row[None]).loss.item())
            base_nll.append(base(row[None], labels=row[None]).loss.item())
    exact, got = torch.cat(divergence).mean().item(), rungs[4]
    assert got.kl_error is not None and got.kl_error < 0.01 * exact
    assert abs(kl(got) - exact) <= got.kl_error
    for name, values in (("perplexity", nll), ("base_perplexity", base_nll)):
        assert got.metrics[name].value == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-4)


def test_the_example_of_the_python_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["python_api.py", str(tmp_path)])
    runpy.run_path(str(MODEL.parent / "python_api.py"))
    said = capsys.readouterr().out
    assert (
        "W4A16-g128" in said and "KL divergence 0.0" in said and "is sound" in said and "LlamaForCausalLM in" in said
    )
    assert {path.name for path in tmp_path.iterdir()} == {"int4", "gptq"}
