"""Keys and values in INT8 and INT4: what they hold, that models generate with them, and what they cost in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    EncoderDecoderCache,
    LlamaConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_quant import QuantCache
from hf_quant.errors import HfQuantError
from hf_quant.hf._compat import cache_argument
from hf_quant.hf.kv_cache import GROUP, Int4Layer, Int8Layer, cache_bytes

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=512,
)  # fmt: skip


def states(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    wide = torch.logspace(-1, 1, 32)  # some channels are larger than others
    return (torch.randn(2, 3, tokens, 32) * wide).to(dtype), torch.randn(2, 3, tokens, 32).to(dtype)


def test_int8_keeps_every_number_to_half_a_step_of_its_token() -> None:
    keys, values = states(7)
    layer = Int8Layer()
    for seen, given in zip(layer.update(keys, values), (keys, values), strict=True):
        step = given.abs().amax(-1, keepdim=True) / 127
        assert bool(((seen - given).abs() <= step * 0.501).all())
    assert layer.key_codes.dtype is torch.int8 and layer.get_seq_length() == 7


def test_int8_does_not_depend_on_how_a_text_is_cut() -> None:
    keys, values = states(9, torch.bfloat16)
    whole, parts = Int8Layer(), Int8Layer()
    expected = whole.update(keys, values)
    for i, j in ((0, 4), (4, 5), (5, 9)):
        found = parts.update(keys[:, :, i:j], values[:, :, i:j])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_int4_keys_by_channel_values_by_token_and_the_newest_as_they_are() -> None:
    keys, values = states(100)
    layer = Int4Layer(recent=10)
    layer.update(keys, values)
    coded = (100 - 10) // GROUP * GROUP
    found_keys, found_values = layer._read()
    assert torch.equal(found_keys[:, :, coded:], keys[:, :, coded:])
    assert torch.equal(found_values[:, :, coded:], values[:, :, coded:])
    groups = keys[:, :, :coded].unflatten(2, (-1, GROUP))
    step = ((groups.amax(3, keepdim=True) - groups.amin(3, keepdim=True)) / 15).expand_as(groups).flatten(2, 3)
    assert bool(((found_keys - keys)[:, :, :coded].abs() <= step * 0.51 + 1e-6).all())
    rows = values[:, :, :coded]
    step = (rows.amax(-1, keepdim=True) - rows.amin(-1, keepdim=True)) / 15
    assert bool(((found_values - values)[:, :, :coded].abs() <= step * 0.51 + 1e-6).all())


@pytest.mark.parametrize("layer", [Int8Layer(), Int4Layer(recent=8)], ids=["int8", "int4"])
@pytest.mark.parametrize("left", [75, 40, 33, 1])
def test_cropping_and_beams(layer: Any, left: int) -> None:
    layer.reset()
    keys, values = states(80)
    layer.update(keys, values)
    before = [t.clone() for t in layer._read()]
    layer.crop(left - 80)
    layer.reorder_cache(torch.tensor([1, 0]))
    after = layer._read()
    assert layer.get_seq_length() == left
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one[[1, 0], :, :left])
    layer.batch_repeat_interleave(2)
    assert layer.update(*(t.repeat_interleave(2, 0) for t in states(1)))[0].shape == (4, 3, left + 1, 32)


def test_values_that_are_not_numbers_stay_visible() -> None:
    for layer in (Int8Layer(), Int4Layer(recent=0)):
        keys, values = states(GROUP)
        keys[0, 0, 3, 4] = torch.nan
        layer.update(keys, values)
        seen, _ = layer._read()
        assert seen.isnan().any()


@pytest.mark.parametrize("layer", [Int8Layer(), Int4Layer(recent=0)], ids=["int8", "int4"])
def test_the_largest_numbers_of_float16_stay_finite(layer: Any) -> None:
    keys, values = states(GROUP, torch.float16)
    keys[..., 3], keys[..., 0, 3] = -34000, 34000
    values[..., 5] = torch.finfo(torch.float16).max
    layer.update(keys, values)
    for seen, given in zip(layer._read(), (keys, values), strict=True):
        assert seen.isfinite().all() and (seen - given).abs().max() <= 0.2 * given.float().abs().max()


@pytest.mark.parametrize("bits", [8, 4])
def test_keys_of_an_encoder_are_read_whole(bits: int) -> None:
    """Models read those of cross-attention as ``cache.layers[i].keys``, without an update."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=64,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=300, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    ids, argument = torch.randint(3, 64, (1, 6)), next(iter(cache_argument(model)))
    cache = EncoderDecoderCache(QuantCache(config, bits), QuantCache(config, bits))
    with torch.no_grad():
        encoded = model.get_encoder()(torch.randn(1, 8, 600))
        expected = model(encoder_outputs=encoded, decoder_input_ids=ids).logits
        parts = [
            model(encoder_outputs=encoded, decoder_input_ids=one, use_cache=True, **{argument: cache}).logits
            for one in ids.split(1, 1)
        ]
    assert cache.cross_attention_cache.layers[0].keys.shape[-2] == 300
    assert (torch.cat(parts, 1) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("bits", "far"), [(8, 0.03), (4, 0.4)])
def test_a_model_computes_nearly_the_same(bits: int, far: float) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    ids = torch.randint(0, 256, (2, 200))
    with torch.no_grad():
        expected = model(ids).logits
        argument = cache_argument(model, "int8" if bits == 8 else "int4")
        parts = [model(part, use_cache=True, **argument).logits for part in ids.split(20, 1)]
    cache = next(iter(argument.values()))
    assert isinstance(cache, QuantCache) and cache.get_seq_length() == 200
    assert (torch.cat(parts, 1) - expected).norm() < far * expected.norm()
    plain = cache_argument(model)
    with torch.no_grad():
        model(ids, use_cache=True, **plain)
    share = cache.nbytes / cache_bytes(next(iter(plain.values())))
    assert share < (0.29 if bits == 8 else 0.75)  # of float32; the newest 128 of 200 tokens stay in INT4


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("beams", [1, 2])
def test_generating(bits: int, beams: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    name = next(iter(cache_argument(model)))
    ids = torch.arange(1, 40)[None]
    made = model.generate(
        ids, max_new_tokens=12, do_sample=False, num_beams=beams, pad_token_id=0, **{name: QuantCache(CONFIG, bits)}
    )
    assert made.shape == (1, 51) and torch.equal(made[:, :39], ids)


def test_layers_with_a_window_keep_their_own_cache(zoo: Any) -> None:
    _, folder = zoo("gemma2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.arange(1, 17)[None], use_cache=True, **cache_argument(model, "int8"))
    assert out.logits.isfinite().all()


@pytest.mark.parametrize(("bits", "recent"), [(3, 128), (16, 128), (8, -1)])
def test_what_a_cache_cannot_be(bits: int, recent: int) -> None:
    with pytest.raises(HfQuantError, match="8 or 4 bits"):
        QuantCache(CONFIG, bits, recent=recent)


def test_the_command_measures_it(tmp_path: Path) -> None:
    import json

    from click.testing import CliRunner

    from hf_quant.cli import main

    model = Path(__file__).parents[2] / "examples" / "ref-llama-16m"
    if not model.is_dir():
        pytest.skip("no examples beside the tests")
    call = ["eval", model, "--base", model, "--kv-cache", "int8", "--max-tokens", 2048, "--json"]
    result = CliRunner().invoke(main, [str(a) for a in call])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["kv_cache"]["kind"] == "int8" and record["kv_cache"]["bytes"] > 0
    assert 0 < record["quality"]["metrics"]["kl"]["value"] < 0.001
