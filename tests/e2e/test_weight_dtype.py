"""Code of transformers and PEFT that looks at the weight of a quantized layer, or counts parameters, sees a float layer."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_quant import HfQuantConfig
from hf_quant.errors import PlanError

IDS = torch.arange(1, 9)[None]
LLAMA = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 1, "num_heads": 2}
MAMBA = {"vocab_size": 128, "hidden_size": 64, "state_size": 16, "num_hidden_layers": 1, "time_step_rank": 8}
ALL = HfQuantConfig("W8A16-g32", quantize_lm_head=True, quantize_embeddings=True)
CASES = {
    "t5, wo": (tf.T5ForConditionalGeneration, tf.T5Config(**T5, decoder_start_token_id=0), {"overrides": {"*.wo": "W8A16-g32"}}),
    "longt5, defaults": (tf.LongT5ForConditionalGeneration, tf.LongT5Config(**T5, decoder_start_token_id=0), {}),
    "mamba, head": (tf.MambaForCausalLM, tf.MambaConfig(**MAMBA, tie_word_embeddings=False), {"quantize_lm_head": True}),
    "mamba, tied": (tf.MambaForCausalLM, tf.MambaConfig(**MAMBA, tie_word_embeddings=True), {"quantize_embeddings": True}),
}  # fmt: skip


def saved(cls: Any, config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    config.initializer_range = 0.1
    model = cls(config).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    logits: torch.Tensor = model(input_ids=IDS, **extra).logits
    return logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CASES)
def test_models_that_cast_to_the_type_of_a_weight(tmp_path: Path, name: str) -> None:
    cls, config, asked = CASES[name]
    base = saved(cls, config, tmp_path)
    model = cls.from_pretrained(tmp_path, quantization_config=HfQuantConfig("W8A16-g32", **asked))
    got = run(model)
    assert apart(got, run(base)) < 0.05
    assert apart(run(model.dequantize()), got) < 1e-4


def test_offloaded_layers_too(tmp_path: Path) -> None:
    cls, config, asked = CASES["t5, wo"]
    base = saved(cls, config, tmp_path / "float")
    cls.from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig("W8A16-g32", **asked)).save_pretrained(
        tmp_path / "codes"
    )
    places = dict.fromkeys(["shared", "decoder", "lm_head", "encoder.embed_tokens", "encoder.final_layer_norm"], "cpu")
    places |= {"encoder.block": "disk", "encoder.dropout": "cpu"}
    model = cls.from_pretrained(tmp_path / "codes", device_map=places, offload_folder=tmp_path / "off")
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert apart(run(model), run(base)) < 0.05


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A float model, and how to load it quantized."""
    folder = tmp_path_factory.mktemp("llama")
    base = saved(tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA, tie_word_embeddings=False), folder)
    return base, lambda **how: tf.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=copy.deepcopy(ALL), **how
    )


@pytest.mark.parametrize("backend", [None, "dequant"])
def test_a_weight_looks_like_a_float_tensor(llama: Any, monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    if backend is not None:
        monkeypatch.setenv("HF_QUANT_BACKEND", backend)
    base, load = llama
    model = load(dtype=torch.bfloat16)
    up = model.model.layers[0].mlp.up_proj
    for layer in (up, model.lm_head, model.model.embed_tokens):
        seen = layer.weight
        assert (seen.dtype, seen.device.type, seen.shape) == (torch.bfloat16, "cpu", layer.dequantize().shape)
        assert next(layer.parameters()).dtype == torch.bfloat16
        dense = layer.dequantize(torch.bfloat16)
        assert torch.equal(seen.float(), dense.float())
        assert torch.equal(seen.T[:3], dense.T[:3])
        assert torch.equal(copy.deepcopy(seen), dense)
        assert torch.equal(pickle.loads(pickle.dumps(seen)), dense)
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    torch.nn.functional.linear(x, up.weight).sum().backward()
    assert torch.equal(x.grad, up.dequantize(torch.bfloat16).sum(0).expand(3, -1))
    assert model.lm_head.float().weight.dtype == torch.float32
    assert model.state_dict()["lm_head.weight"].dtype == torch.uint8
    model.lm_head.to(torch.bfloat16)
    assert apart(run(model).float(), run(base)) < 0.05


def test_a_weight_that_is_codes_cannot_be_written_to(llama: Any) -> None:
    _, load = llama
    model = load()
    before = run(model)
    head = model.lm_head
    attempts = [
        lambda: head.weight.add_(1.0),
        lambda: head.weight.data.mul_(2.0),
        lambda: head.weight[3].zero_(),
        lambda: torch.add(before[0, 0], 1, out=head.weight),
        lambda: setattr(head, "weight", torch.nn.Parameter(torch.zeros(128, 64))),
        lambda: setattr(head.weight, "data", torch.zeros(128, 64)),
        lambda: model.resize_token_embeddings(130),
    ]
    for number, attempt in enumerate(attempts):
        if number == 2:
            attempt()  # a slice is a copy, and its own
            continue
        with torch.no_grad(), pytest.raises(PlanError, match=r"codes.*model\.dequantize\(\)"):
            attempt()
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("backend", [None, "dequant"])
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str | None, tied: bool
) -> None:
    if backend is not None:
        monkeypatch.setenv("HF_QUANT_BACKEND", backend)
    base = saved(tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA, tie_word_embeddings=tied), tmp_path)
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=copy.deepcopy(ALL))
    for without in (False, True):
        assert model.num_parameters(exclude_embeddings=without) == base.num_parameters(exclude_embeddings=without)
    assert sum(p.numel() for p in model.parameters()) == base.num_parameters(), "PEFT counts like this"
    assert model.num_parameters(only_trainable=True) == 3 * 64, "the norms"
    stored = model.hf_quantizer.plan.bytes_quantized
    assert stored <= model.get_memory_footprint() < 2 * stored < base.get_memory_footprint()
    dense = model.dequantize()
    assert dense.get_memory_footprint() == base.get_memory_footprint()
