"""How likely a model ends a thought or an answer, on a small model that is certain of most of its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken

from hf_quant.data.text import SEPARATOR, windows
from hf_quant.evaluation import reference as reference_module
from hf_quant.evaluation.bootstrap import share_interval
from hf_quant.evaluation.endings import END_OF_THOUGHT, NO_ENDINGS, Endings
from hf_quant.evaluation.measure import estimate, evaluate
from hf_quant.evaluation.reference import Reference
from hf_quant.evaluation.results import Quality
from hf_quant.evaluation.yardstick import Base
from tests import yardsticks

CONTEXT = 64
NAMES = [
    f"{kind}{what}"
    for kind in ("end_of_thought", "stop")
    for what in ("", "_base", "_change", "_early", "_early_base")
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return yardsticks.make("chat", tmp_path_factory.mktemp("chat"), torch.float32)


@pytest.fixture(scope="module")
def base(chat: Path) -> Any:
    return Base(str(chat)).load(torch.float32)


def rendered(start: int = 400, count: int = 60) -> str:
    tokenizer = yardsticks.chat_tokenizer()
    chats = yardsticks.chats(start, count)
    return SEPARATOR.join(tokenizer.apply_chat_template(messages, tokenize=False) for messages in chats)


def refer(chat: Path, cache: Path, text: str | None = None, **options: Any) -> Reference:
    return Base(str(chat)).reference(
        yardsticks.chat_tokenizer(), text or rendered(), context=CONTEXT, cache=cache, noise=False, **options
    )


def shy_of(model: Any, token: int, by: float) -> Any:
    """The model with a bias against one token; undone by ``remove``."""

    def bias(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits - by * torch.nn.functional.one_hot(torch.tensor(token), logits.shape[-1])

    return model.lm_head.register_forward_hook(bias)


@pytest.mark.parametrize("top", [128, 8])
def test_values_are_those_of_a_plain_loop_in_float64(
    top: int, chat: Path, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 8 tokens kept exactly, most probabilities away from an ending lie in the tail, and must be exact all the same."""
    monkeypatch.setattr(reference_module, "TOP", top)
    reference = refer(chat, tmp_path, stride=40)
    thought, stops = reference.windows.ids.new_tensor(262), [2, 260]
    hook = shy_of(base, int(thought), 8.0)
    got = evaluate(base, reference)
    rows = []
    for i, (ids, numbers) in enumerate(zip(reference.windows.ids, reference.windows.document, strict=True)):
        with torch.no_grad():
            q = base(ids[None]).logits[0].double().softmax(-1)
            hook.remove()
            p = base(ids[None]).logits[0].double().softmax(-1)
            hook = shy_of(base, int(thought), 8.0)
        for t in range(0 if i == 0 else CONTEXT - 1 - 40, CONTEXT - 1):
            if numbers[t] == numbers[t + 1]:
                rows.append((int(ids[t + 1]), p[t], q[t]))
    hook.remove()
    for kind, tokens in (("stop", stops), ("end_of_thought", [int(thought)])):
        at = [(p[tokens].sum(), q[tokens].sum()) for token, p, q in rows if token in tokens]
        off = [(p[tokens].sum(), q[tokens].sum()) for token, p, q in rows if token not in tokens]
        of_base, of_model = (float(sum(pair[i] for pair in at)) / len(at) for i in (0, 1))
        early_base, early = (float(sum(pair[i] for pair in off)) / len(off) for i in (0, 1))
        wanted = {
            "": of_model, "_base": of_base, "_change": of_model - of_base, "_early": early, "_early_base": early_base,
        }  # fmt: skip
        for suffix, value in wanted.items():
            measured = got.metrics[kind + suffix]
            assert measured.value == pytest.approx(value, rel=1e-5, abs=1e-9), kind + suffix
            assert measured.positions == len(off if "early" in suffix else at)


def test_a_model_that_does_not_stop_thinking_shows_where_the_divergence_does_not(
    chat: Path, base: Any, tmp_path: Path
) -> None:
    reference = refer(chat, tmp_path)
    before = evaluate(base, reference).metrics
    assert [name for name in before if name in NAMES] == NAMES
    assert before["end_of_thought"].value > 0.9 and before["end_of_thought_change"].value == pytest.approx(0, abs=1e-7)
    assert before["stop"].value > 0.9 and before["stop_early"].value < 0.01, "the model is trained"
    hook = shy_of(base, 262, 22.0)
    after = evaluate(base, reference).metrics
    hook.remove()
    assert after["kl"].value < 0.1 and after["top1"].value > 0.97, "since one token in forty ends a thought"
    change = after["end_of_thought_change"]
    assert change.value < -0.15 and change.high is not None and change.high < -0.05
    assert after["end_of_thought"].value == pytest.approx(before["end_of_thought"].value + change.value, abs=1e-6)
    assert abs(after["stop_change"].value) < 0.01, "the other kind stays as it was"


def test_a_model_that_stops_too_early_shows(chat: Path, base: Any, tmp_path: Path) -> None:
    reference = refer(chat, tmp_path)
    hook = shy_of(base, 260, -6.0)
    after = evaluate(base, reference).metrics
    hook.remove()
    assert after["stop_early"].value > 3 * after["stop_early_base"].value
    assert after["stop"].value >= after["stop_base"].value - 1e-9


def test_what_follows_a_document_counts_on_neither_side(chat: Path, base: Any, tmp_path: Path) -> None:
    """The first token of the next document says nothing about this one, not even where it is a stop token."""
    tokenizer = yardsticks.chat_tokenizer()
    documents = rendered(count=30).split(SEPARATOR)
    made = windows(tokenizer, SEPARATOR.join(documents), CONTEXT)
    crossing = int((made.document[:, 1:] != made.document[:, :-1]).sum())
    assert crossing > 5
    metrics = evaluate(base, refer(chat, tmp_path, SEPARATOR.join(documents))).metrics
    for kind in ("stop", "end_of_thought"):
        counted = (metrics[kind].positions or 0) + (metrics[f"{kind}_early"].positions or 0)
        assert counted == made.scored.sum() - crossing
    begun = [f"<|im_end|>{d.removeprefix('<|im_start|>')}" for d in documents]  # as where BOS and EOS are one token
    again = evaluate(base, refer(chat, tmp_path, SEPARATOR.join(begun))).metrics
    assert again["stop"].positions == metrics["stop"].positions


def test_a_text_without_endings_has_no_such_rows(chat: Path, base: Any, tmp_path: Path) -> None:
    plain = yardsticks.text(0, 20)
    quality = evaluate(base, refer(chat, tmp_path, plain))
    assert not [name for name in quality.metrics if name in NAMES]
    silent = rendered().replace("<think>", "").replace("</think>", "")
    names = [name for name in evaluate(base, refer(chat, tmp_path, silent)).metrics if name in NAMES]
    assert names == [name for name in NAMES if name.startswith("stop")]


def test_the_cache_knows_which_tokens_end_something(chat: Path, tmp_path: Path) -> None:
    made = windows(yardsticks.chat_tokenizer(), rendered(), CONTEXT)
    of = Base(str(chat))
    of.reference_on(made, noise=False, cache=tmp_path)
    with_endings = of.reference_on(made, noise=False, cache=tmp_path, endings=Endings((260,), (262,)))
    assert len(list(tmp_path.iterdir())) == 2 and with_endings[0].base.stop.shape[-1] == 1
    of.reference_on(made, noise=False, cache=tmp_path, endings=Endings((2,), (5,)))  # of which the text has none
    assert len(list(tmp_path.iterdir())) == 2


def test_ids_come_from_the_files_of_the_model(chat: Path, tmp_path: Path) -> None:
    tokenizer = yardsticks.chat_tokenizer()
    assert Endings.of(str(chat), tokenizer) == Endings((2, 260), (262,))
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((chat / "config.json").read_text()) | {"eos_token_id": [1, 9999]}
    (bare / "config.json").write_text(json.dumps(config))
    assert Endings.of(str(bare), tokenizer) == Endings((1, 260), (262,)), (
        "no generation_config.json, an id out of range"
    )
    assert Endings.of(str(bare), None) == Endings((1,), ())


@pytest.mark.parametrize("word", END_OF_THOUGHT)
def test_spellings_of_the_end_of_a_thought(word: str, chat: Path) -> None:
    tokenizer = yardsticks.tokenizer()
    assert Endings.of(str(chat), tokenizer).end_of_thought == ()
    tokenizer.add_tokens([AddedToken(word, special=word.startswith("["))])
    assert Endings.of(str(chat), tokenizer).end_of_thought == (259,)


def test_intervals_stay_inside_of_what_is_possible() -> None:
    document = torch.arange(40)
    values = torch.full((40,), 1 - 1e-12, dtype=torch.float64)
    values[3] = 0.0  # one document in which the model never stops: nothing is known of how many there are
    of = estimate(values, document, noise=None, ideal=None, most=1, least=0)
    assert of.low is not None and of.high is not None
    low, high = share_interval(of.value, 40)
    assert 0 < low <= of.low < of.value < of.high <= high < 1
    assert (low, high) == pytest.approx((0.8712, 0.9956), abs=2e-4), "as Wilson's formula gives by hand"
    change = estimate(-values, document, noise=1e-9, ideal=0, most=1, least=-1)
    assert change.low is not None and -1 <= change.low < change.value and change.within_noise is False
    alike = estimate(torch.ones(40, dtype=torch.float64), document, noise=None, ideal=None, most=1, least=0)
    assert alike.low is None, "nothing differs: no interval"


def test_the_record_says_how_many_positions(chat: Path, base: Any, tmp_path: Path) -> None:
    quality = evaluate(base, refer(chat, tmp_path))
    record = quality.to_dict()
    assert record["metrics"]["end_of_thought"]["positions"] == 59 and record["metrics"]["kl"]["positions"] is None
    assert Quality.from_dict(json.loads(json.dumps(record))) == quality
    for metric in record["metrics"].values():
        del metric["positions"]  # as older records are
    assert Quality.from_dict(record).metrics["kl"] == quality.metrics["kl"]


def test_no_endings_is_the_default(chat: Path) -> None:
    assert NO_ENDINGS == Endings() == NO_ENDINGS.in_text(windows(yardsticks.chat_tokenizer(), rendered(), CONTEXT))
