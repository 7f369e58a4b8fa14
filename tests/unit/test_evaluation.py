import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
)

import hf_quant.evaluation.metrics as metrics_folder
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.data import calibration, text
from hf_quant.data.text import paragraphs, read_text, refuse_overlap, windows
from hf_quant.errors import HfQuantError
from hf_quant.evaluation import bootstrap
from hf_quant.evaluation import reference as reference_module
from hf_quant.evaluation.encoders import base_outputs, evaluate_encoder, passages
from hf_quant.evaluation.gate import Budget
from hf_quant.evaluation.layers import layer_errors
from hf_quant.evaluation.measure import _quantile, evaluate, means
from hf_quant.evaluation.reference import Reference, cached_reference
from hf_quant.evaluation.results import Estimate, Quality, why_no_interval
from hf_quant.evaluation.seq2seq import second_halves
from hf_quant.evaluation.yardstick import Base
from hf_quant.hf import HfQuantConfig, load


def tiny(seed: int, vocab: int = 64) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def near(model: Any, by: float) -> Any:
    """A copy whose weights are a little off."""
    torch.manual_seed(7)
    made = type(model)(model.config).eval()
    made.load_state_dict({k: v + by * v.std() * torch.randn_like(v) for k, v in model.state_dict().items()})
    return made


def letters(text: str, **_: Any) -> Any:
    return SimpleNamespace(input_ids=[ord(c) % 64 for c in text])


TEXT = "<|endoftext|>".join(f"document {i} of a few, with numbers {i * 7} and words in it\n" * 3 for i in range(24))


def refer(base: Any, cache: Path, said: list[str] | None = None, **kwargs: Any) -> Reference:
    made = windows(letters, TEXT, kwargs.pop("context", 32), **kwargs)
    return cached_reference(
        lambda dtype: copy.deepcopy(base).to(dtype), "base", made, cache=cache, base_dtype=torch.float32, noise=means,
        say=(said if said is not None else []).append,
    )  # fmt: skip


@pytest.fixture(params=["whole", "sampled"])
def _distributions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to keep the base's distributions, on a small vocabulary."""
    if request.param == "sampled":
        monkeypatch.setattr(reference_module, "TOP", 8)
        monkeypatch.setattr(reference_module, "SAMPLES", 16)


@pytest.mark.usefixtures("_distributions")
def test_a_model_beside_itself_costs_nothing(tmp_path: Path) -> None:
    model = tiny(0)
    got = evaluate(model, refer(model, tmp_path))
    assert got.metrics["kl"].value < 1e-9 and got.metrics["kl"].within_noise
    assert got.metrics["top1"] == Estimate(1, None, None, got.metrics["top1"].noise), "nothing differs: no interval"
    assert got.metrics["perplexity"].value == pytest.approx(got.metrics["base_perplexity"].value, rel=1e-6)
    assert got.documents == 24 and got.resampled == "documents"


@pytest.mark.usefixtures("_distributions")
@pytest.mark.parametrize("stride", [32, 20])
def test_values_are_those_of_a_plain_loop_in_float64(tmp_path: Path, stride: int) -> None:
    base, model = tiny(0), near(tiny(0), 0.1)
    refers = refer(base, tmp_path, stride=stride)
    got = evaluate(model, refers)
    p, q, targets = [], [], []
    made = refers.windows
    for i, row in enumerate(made.ids):
        first = 0 if i == 0 or stride == 32 else 31 - stride
        with torch.no_grad():
            for each, into in ((base, p), (model, q)):
                into.append(each(row[None]).logits[0, first:-1].double().log_softmax(-1))
        targets.append(row[1 + first :])
    log_p, log_q, target = torch.cat(p), torch.cat(q), torch.cat(targets)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    of = got.metrics
    assert got.tokens == len(target) and got.kl_error is not None
    assert abs(of["kl"].value - divergence.mean().item()) <= got.kl_error + 1e-6
    assert got.quantiles["kl_p99"] == pytest.approx(divergence.quantile(0.99).item(), rel=0.2)
    nll = -log_q.gather(-1, target[:, None]).mean().item()
    assert of["perplexity"].value == pytest.approx(math.exp(nll), rel=1e-4)
    base_nll = -log_p.gather(-1, target[:, None]).mean().item()
    assert of["perplexity_ratio"].value == pytest.approx(math.exp(nll - base_nll), rel=1e-5)
    assert of["top1"].value == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
    for e in of.values():
        assert e.low is not None and e.high is not None and e.low <= e.value <= e.high
    assert Quality.from_dict(json.loads(json.dumps(got.to_dict()))) == got


def test_the_base_is_computed_once(tmp_path: Path) -> None:
    said: list[str] = []
    base, model = tiny(0), near(tiny(0), 0.1)
    first = evaluate(model, refer(base, tmp_path, said))

    class Gone:
        def __deepcopy__(self, _: Any) -> Any:
            raise AssertionError("the base was loaded again")

    assert evaluate(model, refer(Gone(), tmp_path, said)) == first and not said
    (folder,) = tmp_path.iterdir()
    part = folder / "part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    for damage in (bytes(data), bytes(data[:-40]), b""):
        part.write_bytes(damage)
        assert evaluate(model, refer(base, tmp_path, said)) == first
    (folder / "meta.json").write_text("{")
    assert evaluate(model, refer(base, tmp_path, said)) == first
    assert len(said) == 4 and all("damaged" in line for line in said)
    refer(base, tmp_path, said, max_tokens=100)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_metric_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "confidence.py").write_text(
        "from hf_quant.evaluation.metrics import Metric\n"
        "METRIC = Metric('confidence', lambda base, log_q, target: log_q.max(-1).values.exp(), quantiles=(0.1,))\n"
    )
    folders = [*metrics_folder.__path__, str(tmp_path / "more")]
    monkeypatch.setattr(metrics_folder, "__path__", folders)
    monkeypatch.setattr(metrics_folder.__spec__, "submodule_search_locations", folders)
    got = evaluate(tiny(1), refer(tiny(0), tmp_path / "cache"))
    assert 0 < got.quantiles["confidence_p10"] < got.metrics["confidence"].value < 1
    assert got.metrics["confidence"].noise is not None


def test_refusals(tmp_path: Path) -> None:
    base = refer(tiny(0), tmp_path)
    with pytest.raises(HfQuantError, match="fewer than one window of 9999"):
        windows(letters, TEXT, 9999)
    with pytest.raises(HfQuantError, match="stride must be from 1"):
        windows(letters, TEXT, 32, stride=33)
    with pytest.raises(HfQuantError, match="vocabularies differ: 65"):
        evaluate(tiny(0, 65), base)
    with pytest.raises(HfQuantError, match="predicts no next tokens"):
        evaluate(bert(BertModel), base)
    broken = tiny(0)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(HfQuantError, match=r"not finite in window 0: model\.layers\.0\.mlp\.up_proj is the first"):
        evaluate(broken, base)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(HfQuantError, match=r"latin\.txt: not UTF-8 at byte 3"):
        read_text(tmp_path / "latin.txt")


def test_windows_are_capped_spread_and_identified() -> None:
    all_of_it, some = windows(letters, TEXT, 32), windows(letters, TEXT, 32, 100)
    assert some.ids.shape == (3, 32) and len(some.document.unique()) > 2
    assert torch.equal(some.ids[0], all_of_it.ids[0]) and some.document[-1, -1] >= 7
    assert some.sha256 != all_of_it.sha256 == windows(letters, TEXT, 32).sha256
    overlapping = windows(letters, TEXT, 32, stride=8)
    assert overlapping.scored.sum() == 31 + 8 * (len(overlapping.ids) - 1)
    assert overlapping.sha256 != all_of_it.sha256


def test_intervals_cover_a_truth_that_is_known() -> None:
    """Documents of unequal length and log-normal difficulty: `benchmarks/bootstrap_coverage.py` does it at length."""
    draw = torch.Generator().manual_seed(1)
    truth, inside = math.exp(0.5), 0
    for i in range(200):
        count = torch.randint(200, 2000, (20,), generator=draw).double()
        means = torch.randn(20, generator=draw, dtype=torch.float64).exp()
        found = bootstrap.interval(means * count, count, seed=i)
        assert found is not None
        inside += found[0] <= truth <= found[1]
    assert 186 <= inside <= 195


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_intervals_where_some_documents_have_next_to_nothing(share: float) -> None:
    """As with a cache that keeps short documents as they are: the logarithms are far from normal."""
    draw = torch.Generator().manual_seed(1)
    truth, inside = (1 - share) * math.exp(0.125), 0
    for i in range(100):
        means = (torch.randn(60, generator=draw, dtype=torch.float64) / 2).exp()
        means *= torch.where(torch.rand(60, generator=draw) < share, 1e-9, 1.0)
        low, high = bootstrap.interval(1000 * means, torch.full((60,), 1000.0).double(), seed=i) or (0.0, 0.0)
        inside += low <= truth <= high
    assert inside >= 91


def test_intervals_of_values_on_both_sides_of_zero() -> None:
    """Documents with a random effect, drawn from themselves."""
    draw = torch.Generator().manual_seed(1)
    inside = 0
    for i in range(200):
        values = (torch.randn(20, 1, generator=draw) + torch.randn(20, 20, generator=draw)).flatten()
        found = bootstrap.interval(*bootstrap.sums(values, torch.arange(20).repeat_interleave(20)), seed=i)
        assert found is not None
        inside += found[0] <= 0 <= found[1]
    assert 186 <= inside <= 196


def test_no_interval_where_it_would_not_cover(tmp_path: Path) -> None:
    count = torch.full((19,), 10.0).double()
    assert bootstrap.interval(torch.arange(19.0).double() + 1, count) is None
    assert bootstrap.interval(torch.ones(24).double(), torch.ones(24).double()) is None, "all alike tell nothing"
    assert bootstrap.interval(torch.eye(24)[0].double(), torch.ones(24).double()) is None, "one alone tells too little"
    few = "<|endoftext|>".join(TEXT.split("<|endoftext|>")[:19])
    made = windows(letters, few, 32)
    base = tiny(0)
    refers = cached_reference(
        lambda dtype: copy.deepcopy(base).to(dtype), "base", made, cache=tmp_path, base_dtype=torch.float32, noise=means,
        say=print,
    )  # fmt: skip
    got = evaluate(near(base, 0.1), refers)
    assert got.documents == 19 and got.resampled is None and len(made.ids) > 20, "windows are no documents"
    assert all(e.low is e.high is e.within_noise is None for e in got.metrics.values())
    reason = why_no_interval(got.to_dict())
    assert reason is not None and "has 19 documents" in reason and "at least 20" in reason
    lines = why_no_interval(got.to_dict() | {"kind": "encoder"})
    assert lines is not None and "(separated by <|endoftext|>; the lines of a single one)" in lines


def bert(kind: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.3,
    )  # fmt: skip
    return kind(config).eval()


def t5(_: Any) -> Any:
    torch.manual_seed(0)
    return T5Model(T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)).eval()


@pytest.mark.parametrize(("make", "names"), [
    (lambda s: bert(BertModel, s), ["embedding_cosine"]),
    (lambda s: bert(BertForMaskedLM, s), ["embedding_cosine", "logits_cosine", "top1"]),
    (t5, ["embedding_cosine"]),
])  # fmt: skip
def test_encoders(make: Any, names: list[str]) -> None:
    texts = passages(lambda t, **_: letters(t[:60]), TEXT, 60)
    base = make(0)
    found = base_outputs(lambda dtype: copy.deepcopy(base).to(dtype), texts, torch.float32)
    same = evaluate_encoder(base, found, texts)
    assert list(same.metrics) == names and same.kind == "encoder" and same.documents == 24
    assert all(e.value == pytest.approx(1, abs=1e-12) for e in same.metrics.values())
    off = evaluate_encoder(near(base, 0.5), found, texts).metrics["embedding_cosine"]
    assert off.value < 0.999 and off.low is not None and off.high is not None
    assert not off.within_noise and off.low < off.value < off.high
    if "top1" in names:
        assert 0 < evaluate_encoder(near(base, 0.5), found, texts).metrics["top1"].value < 1
    with pytest.raises(HfQuantError, match="not measured for encoder"):
        Budget(max_kl=1).misses(same)


def test_a_list_of_sentences() -> None:
    """Each line is a passage and a document; with empty lines, paragraphs are passages of their document."""
    lines = "\n".join(f"Sentence {i} is {'very ' * (i % 3)}short." for i in range(20))
    made = passages(lambda t, **_: letters(t), lines, 512)
    assert len(made.batches) == 20 and len(made.document.unique()) == 20
    assert made.batches[3]["input_ids"].shape[1] == len("Sentence 3 is short.")
    got = passages(lambda t, **_: letters(t), f"{lines}<|endoftext|>{lines}", 512)
    assert len(got.batches) == 40 and len(got.document.unique()) == 2
    paragraphs_of = passages(lambda t, **_: letters(t), f"Heading\n\n{'word ' * 20}\n\n{'more ' * 20}", 512)
    assert len(paragraphs_of.batches) == 2 and len(paragraphs_of.document.unique()) == 1
    base = bert(BertModel)
    found = base_outputs(lambda dtype: copy.deepcopy(base).to(dtype), made, torch.float32)
    off = evaluate_encoder(near(base, 0.1), found, made).metrics["embedding_cosine"]
    assert off.low is not None and off.high is not None and off.high - off.low > 1e-4


def quality(low: float = 0, high: float = 0, **values: float) -> Quality:
    made = {name: Estimate(value, value - low, value + high) for name, value in values.items()}
    return Quality("causal", 1, 1, "documents", 2, 2, "", "float32", "float32", made)


def test_gate() -> None:
    got = quality(kl=0.03, perplexity_ratio=1.005, top1=0.9)
    assert not Budget() and Budget(max_kl=0.0)
    assert not Budget(0.03, 0.006, 0.9).misses(got)
    assert Budget(0.02, 0.01, 0.95).misses(got) == [
        "KL 0.03 is over the 0.02 allowed, by 0.01",
        "top-1 agreement 0.9 is under the 0.95 allowed, by 0.05",
    ]
    assert Budget(max_ppl_increase=0.001).verdict(got)["misses"] == [
        "the increase of perplexity 0.005 is over the 0.001 allowed, by 0.004"
    ]
    assert Budget(max_kl=0.1).misses(quality(kl=math.nan))


def test_the_gate_judges_the_unfavourable_end_of_the_interval() -> None:
    got = quality(0.002, 0.003, kl=0.019, perplexity_ratio=1.005, top1=0.951)
    assert Budget(0.02, 0.01, 0.95).misses(got) == [
        "KL 0.019 (95 % interval up to 0.022) is over the 0.02 allowed, by 0.002",
        "top-1 agreement 0.951 (95 % interval down to 0.949) is under the 0.95 allowed, by 0.001",
    ]
    assert not Budget(0.0221, 0.01, 0.94).misses(got)
    without = replace(got, metrics={"kl": Estimate(0.019, None, None)}, resampled=None)
    assert not Budget(0.02).misses(without) and Budget(0.018).misses(without), "the value, where there is no interval"


def test_nothing_measured_passes_no_gate() -> None:
    nothing = replace(quality(kl=0.0), tokens=0)
    assert Budget(max_kl=1).misses(nothing) == ["nothing was measured: 0 tokens"]
    assert not Budget(max_kl=1).verdict(nothing)["passed"] and Budget().verdict(nothing)["passed"]


def test_quantiles_of_more_values_than_torch_takes() -> None:
    values = torch.rand(1001, dtype=torch.float64)
    values[::7] = torch.nan
    for q in (0.0, 0.5, 0.99, 0.999, 1.0):
        assert _quantile(values, q) == pytest.approx(values.nanquantile(q).item(), rel=1e-15)
    assert _quantile(torch.arange(2**24 + 2, dtype=torch.float64), 0.5) == 2**23 + 0.5


def test_overlap() -> None:
    long = "<|endoftext|>".join(f"{i} " + "word " * 60 for i in range(50))
    refuse_overlap(long, paragraphs("something else " * 30))
    with pytest.raises(HfQuantError, match="2 of 50 paragraphs"):
        refuse_overlap(long, paragraphs("\n\n".join(long.split("<|endoftext|>")[:2]).replace(" ", "  ")))


def test_the_bundled_text_has_enough_documents_and_nothing_of_what_is_calibrated_on() -> None:
    held_out = read_text(text.BUNDLED)
    documents = text.split(held_out)
    assert len(documents) >= 40 and max(map(len, documents)) <= 20_000
    assert not paragraphs(held_out) & paragraphs(read_text(calibration.BUNDLED))


def layers_of(folder: Path, **kwargs: Any) -> Iterator[Any]:
    base = tiny(0)
    base.save_pretrained(folder)
    model = load(str(folder), quantization_config=HfQuantConfig("W4A16-g32", **kwargs))
    yield from (model, Checkpoint.open(folder))


def test_the_broken_layer_comes_first(tmp_path: Path) -> None:
    model, base = layers_of(tmp_path)
    errors = layer_errors(model, base)
    assert len(errors) == 7 and all(0.01 < e.error < 0.2 for e in errors)
    name = errors[-1].layer
    module = model.get_submodule(name)
    module._unpack()  # the kernel's layout has the scales
    module.weight_scale.data *= 2
    module.choose_kernel()
    first = layer_errors(model, base)[0]
    assert (
        first.layer == name
        and first.error == pytest.approx(1, abs=0.05)
        and first.sqnr_db == pytest.approx(0, abs=0.5)
    )


def test_a_decoder_beside_an_encoder_predicts_the_second_half(tmp_path: Path) -> None:
    """Against a loop over windows, with all logits in float64; the encoder reads what the decoder is not asked for."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    base = T5ForConditionalGeneration(config).eval()
    model, text = near(base, 0.3), second_halves(windows(letters, TEXT, 32), config)
    reference = cached_reference(
        lambda dtype: copy.deepcopy(base).to(dtype), "base", text, cache=tmp_path, base_dtype=torch.float32, noise=None,
        say=print,
    )  # fmt: skip
    got = evaluate(model, reference)
    lost = []
    for ids in text.ids:
        given = {
            "input_ids": ids[None, :16],
            "decoder_input_ids": torch.cat([torch.zeros(1).long(), ids[16:-1]])[None],
        }
        with torch.no_grad():
            p, q = (one(**given).logits[0].double().log_softmax(-1) for one in (base, model))
        lost.append((p.exp() * (p - q)).sum(-1))
    assert got.kind == "seq2seq" and got.tokens == 16 * len(text.ids)
    assert (
        got.metrics["kl"].value == pytest.approx(torch.cat(lost).mean().item(), rel=1e-4)
        and got.metrics["kl"].value > 0.01
    )


@pytest.mark.parametrize("stride", [None, 32, 20, 8])
def test_a_decoder_is_measured_on_as_many_tokens_as_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int | None
) -> None:
    T5Config(vocab_size=64, d_model=32, num_layers=1, num_heads=2, decoder_start_token_id=0).save_pretrained(tmp_path)
    monkeypatch.setattr(Base, "reference_on", lambda _, text, **kwargs: text)
    monkeypatch.setattr(Base, "endings", lambda *_: None)
    got: Any = Base(str(tmp_path)).reference(letters, TEXT * 4, context=64, stride=stride, max_tokens=512)
    assert 480 <= int(got.scored.sum()) <= 560
