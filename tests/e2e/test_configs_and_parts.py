"""One configuration for several models, parts of quantized models, poolers, and what is told about the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import Linear

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.errors import HfQuantError, PlanError
from hf_quant.jobs.verify import verify
from hf_quant.nn import QuantLinear

SHAPE = {"vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 66}
IDS = torch.arange(3, 19)[None]


def llama(folder: Path, width: int, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = tf.LlamaConfig(**SHAPE, hidden_size=width, intermediate_size=2 * width, num_key_value_heads=2)
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def roberta(folder: Path) -> Path:
    torch.manual_seed(0)
    tf.RobertaForMaskedLM(tf.RobertaConfig(**SHAPE, hidden_size=64, intermediate_size=96)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", [{}, {"method": "gptq", "calibration": torch.randint(0, 100, (4, 32))}])
def test_one_configuration_serves_several_models(how: dict[str, Any], tmp_path: Path) -> None:
    config, load = HfQuantConfig("W4A16-g64", **how), tf.AutoModelForCausalLM.from_pretrained
    narrow = load(llama(tmp_path / "narrow", 96), quantization_config=config)  # 64 does not divide its rows
    wide = load(llama(tmp_path / "wide", 128), quantization_config=config)
    assert config == HfQuantConfig("W4A16-g64", **how)
    assert {str(m.scheme) for m in wide.modules() if isinstance(m, QuantLinear)} == {"W4A16-g64"}
    for name, model in (("n", narrow), ("w", wide)):
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(load(tmp_path / name)(IDS).logits, model(IDS).logits)


def test_the_config_of_a_loaded_model_loads_it_again(tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(
        llama(tmp_path / "m", 64), quantization_config=HfQuantConfig("W4A16-g32")
    )
    model.save_pretrained(tmp_path / "q")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "q", config=model.config)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("training", [False, True])
def test_a_part_is_not_saved_alone(training: bool, tmp_path: Path) -> None:
    config = HfQuantConfig("W4A16-g32", format="native", training=training)
    model = tf.AutoModelForCausalLM.from_pretrained(llama(tmp_path / "m", 64), quantization_config=config)
    for how in ("save_pretrained", "push_to_hub"):
        with pytest.raises(PlanError, match=r"^model: it is a part of a quantized model.*LlamaModel.from_pretrained"):
            getattr(model.model, how)(tmp_path / "part")
    model.save_pretrained(tmp_path / "q")
    assert tf.AutoModel.from_pretrained(tmp_path / "q").config.model_type == "llama"
    if not training:
        model.dequantize().model.save_pretrained(tmp_path / "floats")
        assert (tmp_path / "floats" / "model.safetensors").is_file()


def test_scales_beside_floats_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = HfQuantConfig("W4A16-g32", format="native")
    model = tf.AutoModelForCausalLM.from_pretrained(llama(tmp_path / "m", 64), quantization_config=config)
    model.save_pretrained(tmp_path / "q")
    file, name = tmp_path / "q" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    save_file(load_file(file) | {name: torch.ones(128, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(HfQuantError, match="weight is in floating point, and scales of codes stand beside it"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "q")


@pytest.mark.parametrize("how", [{}, {"method": "calibrated", "calibration": torch.randint(0, 100, (4, 32))}])
def test_a_pooler_that_is_not_in_the_checkpoint_stays_in_floating_point(how: dict[str, Any], tmp_path: Path) -> None:
    base = roberta(tmp_path / "m")
    own = shutil.copytree(base, tmp_path / "own")  # says that its class is the one with the pooler, and has none
    stored = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(stored | {"architectures": ["RobertaModel"]}))
    assert verify(own).layers_quantized == 0
    assert type(hf_quant.load(str(own), quantization_config=HfQuantConfig("W4A16-g32", **how)).pooler.dense) is Linear
    for load in (tf.AutoModel.from_pretrained, hf_quant.load):
        made = load(str(base), quantization_config=HfQuantConfig("W4A16-g32", **how))
        assert any(isinstance(m, QuantLinear) for m in made.modules())
    encoder = tf.AutoModel.from_pretrained(base, quantization_config=HfQuantConfig("W4A16-g32", **how))
    assert type(encoder.pooler.dense) is Linear
    encoder.save_pretrained(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(tf.AutoModel.from_pretrained(tmp_path / "q")(IDS)[1], encoder(IDS)[1])
    whole = tf.AutoModelForMaskedLM.from_pretrained(base, quantization_config=HfQuantConfig("W4A16-g32"))
    whole.save_pretrained(tmp_path / "whole")
    part = tf.AutoModel.from_pretrained(tmp_path / "whole")
    assert type(part.pooler.dense) is Linear
    assert isinstance(part.encoder.layer[0].attention.self.query, QuantLinear)


def test_a_quantized_head_beside_a_language_model_inside_is_not_missed(tmp_path: Path) -> None:
    vision = tf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = tf.LlamaConfig(**SHAPE, hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    )
    model.save_pretrained(tmp_path / "m")
    config = HfQuantConfig("W4A16-g32", quantize_lm_head=True)
    quantized = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "m", quantization_config=config)
    quantized.save_pretrained(tmp_path / "q")
    inner = tf.AutoModel.from_pretrained(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(inner(IDS)[0], quantized.model(IDS)[0])


@pytest.mark.parametrize("quantized", [False, True])
def test_tensors_that_are_renamed_by_the_caller(quantized: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, load = llama(tmp_path / "m", 64), tf.AutoModelForCausalLM.from_pretrained
    config = HfQuantConfig("W4A16-g32")
    expected = load(folder, quantization_config=config)
    if quantized:
        folder = tmp_path / "q"
        expected.save_pretrained(folder)
    file = folder / "model.safetensors"
    renamed = {name.replace("model.layers", "model.blocks"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    how = {} if quantized else {"quantization_config": config}
    model = load(folder, key_mapping={r"model\.blocks": "model.layers"}, **how)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_codes_are_not_made_to_train(tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(
        llama(tmp_path / "m", 64), quantization_config=HfQuantConfig("W4A16-g32")
    )
    layer = model.model.layers[0].mlp.up_proj
    assert layer.requires_grad_(False) is layer
    with pytest.raises(PlanError, match=r"codes do not train.*modules_to_save.*modules_to_not_convert"):
        layer.requires_grad_()


def test_a_model_in_float64(tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(
        llama(tmp_path / "m", 64), quantization_config=HfQuantConfig("W4A16-g32"), dtype=torch.float64
    )
    assert model(IDS).logits.dtype == torch.float64


def test_a_text_is_not_taken_for_a_name() -> None:
    for text in ("Once upon a time.\nThere was", "word " * 200):
        with pytest.raises(HfQuantError, match=r"a text goes into a list: \[text\]"):
            HfQuantConfig("W4A16-g32", method="gptq", calibration=text)


def with_tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="u"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="u").save_pretrained(folder)


def test_the_tokenizer_is_the_one_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a subfolder, as in a branch of the Hub, it may be another one than that in the root."""
    from hf_quant.hf import calibrate_loaded

    llama(tmp_path / "repo" / "sub", 64)
    with_tokenizer(tmp_path / "repo", ["u", *"abcdef"])
    with_tokenizer(tmp_path / "repo" / "sub", ["u", *"fedcba"])
    seen: list[list[int]] = []
    original = calibrate_loaded.calibration

    def spied(*arguments: Any) -> Any:
        data = original(*arguments)
        seen.append(data.ids.flatten().tolist()[:6])
        return data

    monkeypatch.setattr(calibrate_loaded, "calibration", spied)
    config = HfQuantConfig("W4A16-g32", method="gptq", calibration=["a b c d e f " * 400])
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "repo", subfolder="sub", quantization_config=config)
    assert seen == [[6, 5, 4, 3, 2, 1]]


def test_code_beside_a_model_of_ones_own_class_does_not_run(tmp_path: Path) -> None:
    class Mine(tf.LlamaForCausalLM):
        pass

    folder = llama(tmp_path / "m", 64)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass T: pass\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}))
    config = HfQuantConfig("W4A16-g32", method="gptq", calibration=torch.randint(0, 100, (4, 32)))
    Mine.from_pretrained(folder, quantization_config=config)
    assert not (tmp_path / "ran").exists()


def test_the_config_of_another_program_in_a_subfolder_is_read(tmp_path: Path) -> None:
    fixture = Path(__file__).parents[1] / "golden" / "fixtures" / "gptq-4bit"
    shutil.copytree(fixture, tmp_path / "repo" / "sub")
    config = json.loads((fixture / "config.json").read_text())
    stored = config.pop("quantization_config")
    (tmp_path / "repo" / "sub" / "config.json").write_text(json.dumps(config))
    (tmp_path / "repo" / "sub" / "quantize_config.json").write_text(json.dumps(stored))
    model = hf_quant.load(str(tmp_path / "repo"), subfolder="sub")
    assert any(isinstance(module, QuantLinear) for module in model.modules())
