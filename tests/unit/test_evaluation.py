import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hf_quant.errors import HfQuantError
from hf_quant.evaluation import evaluate, read_text
from hf_quant.evaluation.kl import kl
from hf_quant.evaluation.text import windows


def tiny(seed: int, vocab: int = 64) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def letters(text: str, **_: Any) -> Any:
    return SimpleNamespace(input_ids=[ord(c) % 64 for c in text])


TEXT = "<|endoftext|>".join(f"document {i} of a few, with numbers {i * 7} and words in it\n" * 3 for i in range(6))


def test_a_model_beside_itself_costs_nothing() -> None:
    model = tiny(0)
    got = evaluate(model, model, letters, TEXT, context=32)
    assert got.kl_mean == got.kl_p99 == 0 and got.top1 == 1 and got.perplexity == got.base_perplexity
    assert got.documents == 6


def test_values_are_those_of_a_plain_loop_in_float64() -> None:
    base, model = tiny(0), tiny(1)
    got = evaluate(model, base, letters, TEXT, context=32, batch=3)
    ids = windows(letters, TEXT, 32).ids
    logs = []
    for each in (base, model):
        with torch.no_grad():
            logs.append(torch.cat([each(row[None]).logits[:, :-1].double().log_softmax(-1) for row in ids]))
    p, q = logs
    divergence = (p.exp() * (p - q)).sum(-1).flatten()
    assert got.kl_mean == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert got.kl_median == pytest.approx(divergence.median().item(), rel=1e-3)
    assert got.kl_p99 == pytest.approx(divergence.quantile(0.99).item(), rel=1e-3)
    nll = -q.gather(-1, ids[:, 1:, None]).mean().item()
    assert got.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert got.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert got.tokens == ids.shape[0] * 31


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    assert kl(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))


def test_refusals(tmp_path: Path) -> None:
    model = tiny(0)
    with pytest.raises(HfQuantError, match="fewer than one window of 9999"):
        evaluate(model, model, letters, TEXT, context=9999)
    with pytest.raises(HfQuantError, match="vocabularies differ: 65"):
        evaluate(tiny(0, 65), model, letters, TEXT, context=32)
    with pytest.raises(HfQuantError, match="causal"):
        encoder = BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        )
        evaluate(encoder, model, letters, TEXT, context=32)
    broken = tiny(0)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(HfQuantError, match="not finite in window 0"):
        evaluate(broken, model, letters, TEXT, context=32)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(HfQuantError, match=r"latin\.txt: not UTF-8 at byte 3"):
        read_text(tmp_path / "latin.txt")


def test_windows_are_capped_and_identified() -> None:
    all_of_it, some = windows(letters, TEXT, 32), windows(letters, TEXT, 32, 100)
    assert some.ids.shape == (3, 32) and torch.equal(some.ids, all_of_it.ids[:3])
    assert some.sha256 != all_of_it.sha256 == windows(letters, TEXT, 32).sha256
