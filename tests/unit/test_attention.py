"""Attention of one token, in models that this package quantized."""

import math
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_quant import HfQuantConfig
from hf_quant.hf import attention

BASE = LlamaConfig(
    hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, vocab_size=64
)  # fmt: skip


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One head and one query after the other, in float64."""
    batch, heads, _, _ = query.shape
    output = torch.empty(batch, 1, heads, value.shape[-1], dtype=torch.float64)
    for b, h in product(range(batch), range(heads)):
        g = h // (heads // key.shape[1])
        scores = key[b, g].double() @ query[b, h, 0].double() * scale
        if mask is not None:
            row = mask.expand(batch, heads, 1, -1)[b, h, 0]
            scores = scores.masked_fill(~row, -math.inf) if row.dtype == torch.bool else scores + row.double()
        output[b, 0, h] = scores.softmax(0) @ value[b, g].double()
    return output


def masks(kind: str, batch: int, heads: int, length: int, dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    padding = torch.rand(batch, 1, 1, length) > 0.3
    padding[..., -1] = True  # a token sees itself
    return padding if kind == "padding" else torch.randn(batch, heads, 1, length).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["none", "padding", "added, head by head"])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "width", "values", "length"),
    [(1, 32, 8, 64, 64, 150), (3, 6, 2, 80, 48, 577), (2, 4, 4, 128, 128, 33), (1, 9, 1, 24, 24, 1)],
)
def test_it_is_attention(
    dtype: torch.dtype, kind: str, batch: int, heads: int, groups: int, width: int, values: int, length: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(batch, 1, heads, width).to(dtype).transpose(1, 2) * 3  # peaked
    key = torch.randn(batch, groups, length, width).to(dtype)
    value = torch.randn(batch, groups, length, values).to(dtype)
    mask = masks(kind, batch, heads, length, dtype)
    for scale in (None, 0.3):
        wanted = plain(query, key, value, mask, scale or width**-0.5)
        output = attention.one_token(query, key, value, mask, scale)
        assert output.is_contiguous()  # models take views of it
        error = output.double() - wanted
        assert error.norm() < (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps * wanted.norm()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that came to `one_token`."""
    seen: list[tuple[int, ...]] = []
    original = attention.one_token

    def watched(query: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return original(query, *rest)

    monkeypatch.setattr(attention, "one_token", watched)
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    where = str(tmp_path_factory.mktemp("model"))
    AutoModelForCausalLM.from_config(BASE, dtype=torch.bfloat16).save_pretrained(where)
    return where


def generate(model: Any, **how: Any) -> Any:
    ids = torch.arange(20).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded on the left
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, **how,
    )  # fmt: skip


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("training", [False, True])
def test_generate_uses_it(folder: str, calls: list[tuple[int, ...]], cache: str, training: bool) -> None:
    config = HfQuantConfig("W4A16-g32", training=training)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config).eval()
    got = generate(model, cache_implementation=cache)
    assert calls == [(2, 6, 1, 16)] * 3 * BASE.num_hidden_layers
    model.set_attn_implementation("eager")
    wanted = generate(model)
    assert len(calls) == 3 * BASE.num_hidden_layers
    for one, other in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_layers_with_adapters_use_it(folder: str, calls: list[tuple[int, ...]]) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig("W4A16-g32"))
    generate(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], r=2)))
    assert len(calls) == 3 * BASE.num_hidden_layers


def test_compiled_without_a_break(folder: str) -> None:
    config = HfQuantConfig("W4A16-g32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config).eval()
    wanted = generate(model, cache_implementation="static")
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    got = generate(model, cache_implementation="static")
    for one, other in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_other_models_are_left_alone(folder: str, calls: list[tuple[int, ...]]) -> None:
    attention.install()
    generate(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    config = HfQuantConfig("W4A16-g32", modules_to_not_convert=["self_attn"])
    generate(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config))
    assert not calls


def test_what_it_does_not_know_is_left_to_transformers(folder: str, calls: list[tuple[int, ...]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig("W4A16-g32"))
    layer: Any = model.model.layers[0].self_attn
    attend = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
    query, key = torch.randn(2, 6, 1, 16), torch.randn(2, 2, 5, 16)
    attend(layer, query, key, key, None, dropout=0.5)
    attend(layer, query, key, key, None, position_bias=torch.zeros(2, 6, 1, 5))
    attend(layer, query[:1], key, key, torch.ones(2, 1, 1, 5, dtype=torch.bool))
    groups, layer.num_key_value_groups = layer.num_key_value_groups, 1  # otherwise transformers repeats the keys
    attend(layer, query[:, :2], key, key, torch.ones(1, 5, dtype=torch.bool))
    attend(layer, query[:1, :2], key[:1], key, None)
    with suppress(RuntimeError):  # of older versions
        attend(layer, query[:, :1], key, key, None)
    layer.num_key_value_groups = groups
    with suppress(ValueError):  # of newer versions
        attend(layer, query, key, key, None, softcap=30.0)
    assert not calls
    attend(layer, query, key, key, None)
    assert len(calls) == 1


def test_somebody_elses_stays(folder: str, calls: list[tuple[int, ...]]) -> None:
    before, lengths = attention.ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def mine(module: Any, query: Tensor, *args: Any, **options: Any) -> Any:
        lengths.append(query.shape[2])
        return before.__wrapped__(module, query, *args, **options)

    attention.AttentionInterface.register("sdpa", mine)
    try:
        generate(AutoModelForCausalLM.from_pretrained(folder, quantization_config=HfQuantConfig("W4A16-g32")))
    finally:
        attention.AttentionInterface.register("sdpa", before)
    assert lengths == [10] * BASE.num_hidden_layers + [1] * 3 * BASE.num_hidden_layers and not calls


def test_installed_once() -> None:
    attention.install()
    before = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
    attention.install()
    assert attention.ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert before.__wrapped__.__module__.startswith("transformers.")
