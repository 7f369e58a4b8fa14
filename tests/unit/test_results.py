"""What results.json keeps, of which base it speaks, and what is said of single layers."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_quant.disk.atomic
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.layers import layer_errors
from hf_quant.evaluation.yardstick import Base
from hf_quant.hf import HfQuantConfig, load
from hf_quant.jobs.base import base_of, remember
from hf_quant.jobs.compress import _check
from hf_quant.jobs.stored import store_results


def measured(tokens: int, kl: float, resampled: str | None = "documents") -> dict[str, Any]:
    metrics = {"kl": {"value": kl, "low": kl, "high": kl, "noise": None, "within_noise": None}}
    return {
        "kind": "causal", "tokens": tokens, "documents": 20 if resampled else 3, "resampled": resampled, "context": 512,
        "stride": 512, "text_sha256": "0" * 64, "dtype": "float32", "base_dtype": "float32", "metrics": metrics,
        "quantiles": {}, "kl_error": 0.0,
    }  # fmt: skip


def stored(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_less_text_does_not_replace_what_was_measured_on_more(tmp_path: Path) -> None:
    said: list[str] = []
    budget = {"max_kl": 0.02}
    store_results(tmp_path, {"quality": measured(32_000, 0.01)}, said.append)
    gate = {"budget": budget, "passed": False, "misses": ["KL 0.03 is over the 0.02 allowed, by 0.01"]}
    store_results(tmp_path, {"quality": measured(500, 0.03), "gate": gate, "layers": []}, said.append)
    assert stored(tmp_path)["quality"]["tokens"] == 32_000 and stored(tmp_path)["layers"] == []
    assert stored(tmp_path)["gate"] == {"budget": budget, "passed": True, "misses": []}
    assert len(said) == 1 and "32,000 tokens of 20 documents" in said[0] and "judges that by the gate" in said[0]
    store_results(tmp_path, {"quality": measured(90_000, 0.04, None)}, said.append)
    assert stored(tmp_path)["quality"]["tokens"] == 32_000 and len(said) == 2, "no interval says less"
    store_results(tmp_path, {"quality": measured(32_000, 0.02)}, said.append)
    assert stored(tmp_path)["quality"]["metrics"]["kl"]["value"] == 0.02 and len(said) == 2


def test_who_writes_at_the_same_time_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hf_quant.disk.atomic.write_json
    monkeypatch.setattr(hf_quant.disk.atomic, "write_json", lambda path, obj: (time.sleep(0.02), real(path, obj)))
    threads = [threading.Thread(target=store_results, args=(tmp_path, {f"field{i}": i})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {f"field{i}" for i in range(8)} < stored(tmp_path).keys()
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"], "the lock lies elsewhere"


def test_a_model_is_held_against_the_commit_it_was_made_from(tmp_path: Path) -> None:
    recipe = {"source": {"model": "owner/name", "revision": "abc"}}
    assert base_of("m", recipe, None) == ("owner/name", "abc")
    assert base_of("m", recipe, "owner/name") == ("owner/name", "abc")
    assert base_of("m", recipe, "owner/other") == ("owner/other", None)
    assert base_of("m", recipe, str(tmp_path)) == (str(tmp_path), None)
    with pytest.raises(HfQuantError, match="--base"):
        base_of("m", {}, None)
    with pytest.raises(HfQuantError, match="folder called 'name'"):
        base_of("m", {"source": {"model": "name"}}, None)


def test_a_local_base_is_remembered_and_not_published(tmp_path: Path) -> None:
    base, out, moved = (tmp_path / name for name in ("base", "out", "moved"))
    for path in (base, out):
        path.mkdir()
        (path / "config.json").write_text("{}")
    recipe = {"source": {"model": "base", "revision": None}}
    (out / "recipe.json").write_text(json.dumps(recipe))
    remember(out, str(base))
    assert base_of(str(out), recipe, None) == (str(base), None)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "recipe.json"]
    (out / "recipe.json").write_text(json.dumps(recipe | {"scheme": "another"}))
    with pytest.raises(HfQuantError, match="--base"):
        base_of(str(out), recipe, None)
    remember(out, str(base))
    base.rename(moved)
    with pytest.raises(HfQuantError, match="--base"):
        base_of(str(out), recipe, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("tiny")
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.uniform_(0.5, 2)
    model.save_pretrained(made)
    return made


def test_rewritten_weights_are_not_compared_with_the_base(folder: Path) -> None:
    """A rotation makes every weight another one: 140 % from the base's, and none the worse for it."""
    base, ids = Checkpoint.open(folder), torch.randint(64, (4, 32))
    config = HfQuantConfig("W8A16-g32", method="hadamard+rtn", calibration=ids)
    rotated = load(str(folder), quantization_config=config)
    assert layer_errors(rotated, base) == []
    plain = load(str(folder), quantization_config=HfQuantConfig("W8A16-g32"))
    errors = layer_errors(plain, base)
    assert len(errors) == 7 and all(e.of == "weights" and 0 < e.error < 0.02 for e in errors)
    blocks = [{"layers": {e.layer: 1e-6 * (i + 1) for i, e in enumerate(errors)}}]
    outputs = layer_errors(rotated, base, blocks)
    assert [e.layer for e in outputs] == [e.layer for e in reversed(errors)]
    assert outputs[-1].error == pytest.approx(1e-3) and outputs[-1].sqnr_db == pytest.approx(60)
    assert all(e.of == "outputs" for e in outputs)


def test_the_cache_of_the_base_knows_what_computed_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(str(folder))
    before = base.circumstances()
    assert torch.__version__ in before and "sdpa" in before and "cpu" in before
    assert Base(str(folder), device="cuda").circumstances() != before
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert base.circumstances() != before


@pytest.mark.parametrize("theirs", ['{"accuracy": 0.9}', "[1, 2]"])
def test_results_of_somebody_else_are_left_alone(theirs: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(theirs)
    said: list[str] = []
    store_results(tmp_path, {"bench": {}}, said.append)
    assert (tmp_path / "results.json").read_text() == theirs and "was not written by hf-quant" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_last_digits_do_not_refuse_a_saved_model(dtype: torch.dtype) -> None:
    logits = torch.linspace(-4, 4, 64).to(dtype)
    _check(logits, logits * (1 + torch.finfo(dtype).eps), "W4A16-g32")
    for wrong in (logits * 1.2, logits.roll(1) + 1, logits + torch.nan):
        with pytest.raises(HfQuantError, match="something else"):
            _check(logits, wrong, "W4A16-g32")
    with pytest.raises(HfQuantError, match="NaN or infinite"):
        _check(logits + torch.inf, None, "W4A16-g32")
