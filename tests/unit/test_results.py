"""What results.json keeps, of which base it speaks, and what is said of single layers."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

import hf_quant.disk.atomic
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.errors import HfQuantError
from hf_quant.evaluation.layers import layer_errors
from hf_quant.evaluation.yardstick import Base
from hf_quant.hf import HfQuantConfig, load
from hf_quant.jobs.base import base_of, recipe_of, refuse_itself, remember, why_not_its_base
from hf_quant.jobs.compress import _check
from hf_quant.jobs.stored import check_results, store_beside_base, store_results


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


def test_new_numbers_are_held_against_the_budget_of_the_old_ones(tmp_path: Path) -> None:
    said: list[str] = []
    gate = {"budget": {"max_kl": 0.02}, "passed": True, "misses": []}
    store_results(tmp_path, {"quality": measured(500, 0.01), "gate": gate}, said.append)
    store_results(tmp_path, {"quality": measured(32_000, 0.03)}, said.append)
    assert not stored(tmp_path)["gate"]["passed"] and "over the 0.02 allowed" in stored(tmp_path)["gate"]["misses"][0]
    assert len(said) == 1 and "is out of the budget that it was held against before (max_kl 0.02)" in said[0]
    store_results(tmp_path, {"quality": measured(32_000, 0.01)}, said.append)
    assert stored(tmp_path)["gate"] == gate and len(said) == 2
    encoder = measured(32_000, 0.01) | {"kind": "encoder", "metrics": {}}
    store_results(tmp_path, {"quality": encoder}, said.append)
    assert "gate" not in stored(tmp_path) and "not measured for encoder models" in said[2]


def test_what_cannot_be_stored_is_said_and_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    said: list[str] = []
    monkeypatch.setattr(hf_quant.disk.atomic, "write_json", refused)
    store_results(tmp_path, {"bench": {}}, said.append)
    assert len(said) == 1 and "nothing is stored" in said[0] and "Permission denied" in said[0]


@pytest.mark.parametrize(
    ("damaged", "name"),
    [("{oops", "Expecting"), ('{"files": [], "quality": {}}', "quality"), ('{"files": 5}', "files")],
)
def test_damaged_results_are_named_before_anything_is_measured(damaged: str, name: str, tmp_path: Path) -> None:
    check_results(tmp_path)
    (tmp_path / "results.json").write_text(damaged)
    with pytest.raises(HfQuantError, match=f"{tmp_path.name}: results.json: {name}.*mend it, or move it away"):
        check_results(tmp_path)
    said: list[str] = []
    store_results(tmp_path, {"bench": {}}, said.append)
    assert (tmp_path / "results.json").read_text() == damaged and "nothing is stored" in said[0]


ROBERTA = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
RECIPE = {
    "scheme": "W4A16-g32", "method": "rtn", "format": "native", "source": {"model": "base", "revision": None},
    "schemes": {}, "left": {}, "versions": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("calibration", "text"), ("training", [1]), ("blocks", 5), ("blocks", [{}]), ("blocks", [{"layers": {"a": "b"}}]),
        ("blocks", [{"layers": {"a": -1}}]), ("source", {"model": 5}),
    ],
)  # fmt: skip
def test_a_damaged_recipe_is_named_by_its_field(field: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | {"blocks": [{"layers": {"a": 0.1, "b": None}}]}))
    assert recipe_of(str(tmp_path))["scheme"] == "W4A16-g32"
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | {field: value}))
    with pytest.raises(HfQuantError, match=rf"{tmp_path.name}: recipe.json: {field}"):
        recipe_of(str(tmp_path))


def test_only_what_was_measured_beside_the_base_is_stored(tmp_path: Path) -> None:
    base, other, moved, out = (tmp_path / name for name in ("base", "other", "moved/base", "out"))
    for path in (base, other, moved, out):
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
    (out / "recipe.json").write_text(json.dumps(RECIPE))
    why_not = [why_not_its_base(str(out), RECIPE, str(folder)) for folder in (base, moved, other)]
    assert why_not[:2] == [None, None] and "is not known to be base" in (why_not[2] or "")
    remember(out, str(base))
    assert why_not_its_base(str(out), RECIPE, str(base)) is None
    assert why_not_its_base(str(out), RECIPE, str(moved)), "it is known where the base is"
    of_hub = RECIPE | {"source": {"model": "owner/name", "revision": "abc"}}
    assert why_not_its_base("m", of_hub, "owner/name") is None and why_not_its_base("m", of_hub, "owner/other")
    assert why_not_its_base("m", {}, "owner/name") is None and why_not_its_base("m", {}, "m")
    said: list[str] = []
    store_beside_base(str(out), RECIPE, str(other), {"bench": {}}, said.append)
    assert not (out / "results.json").exists() and "nothing is stored in results.json" in said[0]
    store_beside_base(str(out), RECIPE, str(base), {"bench": {}}, said.append)
    assert "bench" in stored(out) and len(said) == 1
    with pytest.raises(HfQuantError, match="is MODEL itself"):
        refuse_itself(str(out), RECIPE, f"{out}/")
    refuse_itself(str(out), {}, str(out))  # nothing says that it was made from another model


def test_who_writes_at_the_same_time_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hf_quant.disk.atomic.write_json
    monkeypatch.setattr(hf_quant.disk.atomic, "write_json", lambda path, obj: (time.sleep(0.02), real(path, obj)))
    records: list[dict[str, Any]] = [
        {"folder": "x"}, {"format": "native"}, {"share_quantized": 0.5}, {"bits_per_weight": 4.5}, {"base_bytes": 1},
        {"parameters": 1}, {"seconds": 1.0}, {"date": "2026-11-30"},
    ]  # fmt: skip
    threads = [threading.Thread(target=store_results, args=(tmp_path, record)) for record in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name for record in records for name in record} < stored(tmp_path).keys()
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


def test_the_cache_of_the_base_knows_its_code_and_other_weights_of_the_same_size_and_time(tmp_path: Path) -> None:
    weights, code = tmp_path / "model.safetensors", tmp_path / "modeling_toy.py"
    weights.write_bytes(b"1234")
    code.write_text("SCALE = 1")
    identities = [Base(str(tmp_path)).identity()]
    code.write_text("SCALE = 2")
    identities.append(Base(str(tmp_path)).identity())
    before = weights.stat()
    weights.rename(tmp_path / "old")
    weights.write_bytes(b"5678")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p and rsync leave it
    identities.append(Base(str(tmp_path)).identity())
    assert len(set(identities)) == 3 and identities[2] == Base(str(tmp_path)).identity()


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)), 16),
        (lambda: RobertaModel(RobertaConfig(**ROBERTA, max_position_embeddings=18, pad_token_id=1)), 16),
    ],
    ids=["GPT-2", "RoBERTa"],
)
def test_the_longest_window_of_a_model(model: Any, positions: int, tmp_path: Path) -> None:
    model = model().eval()
    model.save_pretrained(tmp_path)
    base = Base(str(tmp_path))
    assert base.context() == base.positions == positions
    base.refuse_longer(positions)
    with pytest.raises(HfQuantError, match=f"longer than the {positions} positions"):
        base.refuse_longer(positions + 1)
    ids = torch.full((1, positions), 5)
    model(ids)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.cat([ids, ids], 1))


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
