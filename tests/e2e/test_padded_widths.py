"""Models with layers whose in_features is no multiple of 32: planned, made by every method, saved, loaded, trained and converted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hf_quant import HfQuantConfig, load, merge_adapters
from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import CheckpointError, FormatError, HfQuantError, PlanError
from hf_quant.hf import calibrate_shards
from hf_quant.hf.plan import Plan, make_plan
from hf_quant.jobs.convert import convert
from hf_quant.nn import QuantEmbedding, QuantLinear

from .test_qat import trainable, trainer
from .test_streaming import IDS, SMALL, logits, stream

ODD = SMALL | {"intermediate_size": 100, "num_hidden_layers": 2}
CONFIGS = {
    "llama": tf.LlamaConfig(**ODD),
    "gpt2": tf.GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_inner=100, n_layer=2, n_head=2),
    "everywhere": tf.LlamaConfig(**ODD | {"hidden_size": 100, "intermediate_size": 136}, tie_word_embeddings=True),
}
SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FEW = IDS[:, :32]


def made(folder: Path, name: str = "llama") -> Path:
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="50KB"
    )
    return folder


def quantized(source: Path, slug: str = "W4A16-g32", **how: Any) -> Any:
    return load(str(source), quantization_config=HfQuantConfig(slug, **how))


def planned(config: Any, slug: str = "W4A16-g32", **how: Any) -> Plan:
    with torch.device("meta"):
        return make_plan(tf.AutoModelForCausalLM.from_config(config), HfQuantConfig(slug, **how))


def stored_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize(
    ("name", "method", "slug"),
    [
        ("llama", "rtn", "W4A16-g128"), ("llama", "hqq", "W3A16-g32-asym"), ("llama", "gptq", "W4A16-g32-o2%"),
        ("llama", "calibrated", "W2A16-g64-asym"), ("llama", "learned", "W3A16-g32"), ("llama", "awq", "W8A16-g32"),
        ("llama", "smoothquant+rtn", "W8A8"), ("llama", "hadamard+gptq", "W4A16-g32"), ("llama", "gptq", "W8A8-static-o2%-columns"),
        ("gpt2", "calibrated", "W4A16-g32"), ("gpt2", "rtn", "W8A8"), ("everywhere", "calibrated", "W4A16-g64"),
    ],
)  # fmt: skip
def test_every_method_in_memory_and_from_shards(name: str, method: str, slug: str, tmp_path: Path) -> None:
    source = made(tmp_path / "base", name)
    base = logits(load(str(source)))
    model = quantized(source, slug, method=method, **{} if method in ("rtn", "hqq") else {"calibration": FEW})
    found, plan = logits(model), model.hf_quantizer.plan
    odd = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.scheme.padding}
    assert odd and plan.format == "native" and "compressed-tensors cannot" in plan.format_reason
    assert all(m.in_features % 32 and "padded to" in plan.regrouped[n] for n, m in odd.items())
    assert float((found - base).norm() / base.norm()) < (0.8 if model.config.quantization_config.bits < 4 else 0.4)
    if method not in ("rtn", "hqq"):
        stream(source, tmp_path / "out", slug, FEW, method=method)
        assert torch.equal(logits(load(str(tmp_path / "out"))), found)
    model.save_pretrained(tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    assert torch.equal(logits(again), found)
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert all(stored["overrides"][n].endswith(f"-pad{m.scheme.padding}") for n, m in odd.items())
    assert stored_bytes(tmp_path / "saved") == plan.bytes_quantized
    assert model.num_parameters() == plan.params
    twin = model.dequantize()
    layer = twin.get_submodule(next(iter(odd)))
    assert layer.weight.shape in ((64, 100), (100, 64), (100, 100), (100, 136), (136, 100))
    assert float((logits(twin) - found).norm() / found.norm()) < 0.06


def test_auto_gives_up_a_format_that_others_read_only_where_it_pays() -> None:
    """Heads of 10 columns: the output projections are 0.6 % of the weights, or 40 %."""
    narrow = tf.LlamaConfig(**SMALL | {"head_dim": 10, "intermediate_size": 1024})
    plan = planned(narrow)
    left = {reason for name, reason in plan.left.items() if name.endswith("o_proj")}
    assert plan.format == "compressed_tensors" and len(left) == 1 and "o_proj" not in " ".join(plan.schemes)
    assert (
        "in_features 20 is not a multiple of 32; format='native' pads it" in (reason := left.pop()) and "5%" in reason
    )
    plan = planned(narrow, format="native")
    assert {str(s) for n, s in plan.schemes.items() if n.endswith("o_proj")} == {"W4A16-g32-pad12"}
    assert "in_features 20 padded to 32 by zeros: model.layers.0.self_attn.o_proj and 2 more" in plan.summary()
    plan = planned(CONFIGS["llama"], format="compressed_tensors")
    assert plan.format == "compressed_tensors" and "5%" not in plan.left["model.layers.0.mlp.down_proj"]
    with pytest.raises(PlanError, match="format='native' pads it"):
        planned(
            tf.LlamaConfig(**ODD | {"hidden_size": 100}),
            format="compressed_tensors",
            modules_to_not_convert=["down_proj"],
        )


def test_what_stays_in_floating_point() -> None:
    plan = planned(tf.LlamaConfig(**SMALL | {"head_dim": 2}), format="native")
    assert (
        plan.left["model.layers.0.self_attn.o_proj"]
        == "in_features 4 is not a multiple of 32, and padded codes would take no less memory"
    )
    experts = tf.MixtralConfig(**SMALL | {"intermediate_size": 100}, num_local_experts=2)
    plan = planned(experts, format="native")
    assert (
        plan.left["model.layers.0.mlp.experts.down_proj"]
        == "in_features 100 is not a multiple of 32, and stacks of experts are not padded"
    )
    with pytest.raises(
        PlanError, match=r"does not divide in_features 100; give this layer another scheme, overrides=.*'W8A16-g32'"
    ):
        planned(CONFIGS["everywhere"], "Q4_K")
    with pytest.raises(PlanError, match="takes a padding of 28, which need not be given"):
        planned(CONFIGS["llama"], overrides={"*.down_proj": "W4A16-g32-pad4"})
    assert planned(CONFIGS["llama"], overrides={"*.down_proj": "W4A16-g32-pad28"}).format == "native"


def test_tables_of_embeddings_and_heads(tmp_path: Path) -> None:
    model = quantized(made(tmp_path / "base", "everywhere"), quantize_embeddings=True)
    table, head = model.model.embed_tokens, model.lm_head
    assert isinstance(table, QuantEmbedding) and str(table.scheme) == str(head.scheme) == "W4A16-g32-pad28"
    model.save_pretrained(tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(model)) and again.hf_quantizer.plan.tied
    assert stored_bytes(tmp_path / "saved") == model.hf_quantizer.plan.bytes_quantized


@pytest.mark.parametrize("slug", ["W4A16-g32", "W4A16-g32-pad12", "W4A16-g128-pad28"])
def test_a_config_that_says_another_padding(slug: str, tmp_path: Path) -> None:
    quantized(made(tmp_path / "base")).save_pretrained(tmp_path / "saved")
    config = json.loads((file := tmp_path / "saved" / "config.json").read_text())
    config["quantization_config"]["overrides"]["model.layers.0.mlp.down_proj"] = slug
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj.*(shape|100)"):
        load(str(tmp_path / "saved"))


def test_other_formats_refuse_and_dense_holds_the_values(tmp_path: Path) -> None:
    model = quantized(made(tmp_path / "base"))
    model.save_pretrained(tmp_path / "saved")
    for to in ("compressed-tensors", "gptq", "awq", "mlx", "gguf"):
        with pytest.raises(
            FormatError, match=r"28 zero columns behind a layer's own, which the native format has|gguf: "
        ):
            convert(tmp_path / "saved", tmp_path / to, to=to)
    convert(tmp_path / "saved", tmp_path / "dense", to="dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    layer = model.model.layers[0].mlp.down_proj
    assert torch.equal(weights["model.layers.0.mlp.down_proj.weight"], layer.dequantize())


def test_an_interruption_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, solve, calls = made(tmp_path / "base"), calibrate_shards.solve, []
    stream(source, tmp_path / "whole", "W3A16-g32", FEW, method="calibrated")

    def stops(block: Any, *rest: Any) -> Any:
        calls.append(block.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(block, *rest)

    monkeypatch.setattr(calibrate_shards, "solve", stops)
    for _ in range(2):
        try:
            stream(source, tmp_path / "cut", "W3A16-g32", FEW, method="calibrated")
        except KeyboardInterrupt:
            continue
    assert calls == ["model.layers.0", "model.layers.1", "model.layers.1"]
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()


def test_adapters_on_top_and_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = quantized(made(tmp_path / "base"))
    before, target = logits(model), "model.layers.0.mlp.down_proj"
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    adapted = logits(tuned)
    assert (adapted - before).norm() > 1e-2 * before.norm()
    grid = model.get_submodule(f"{target}.base_layer").weight_scale.clone()
    merged, lost = merge_adapters(tuned)
    layer = merged.get_submodule(target)
    assert target in lost and layer.scheme == QuantScheme(4, 32, padding=28) and torch.equal(layer.weight_scale, grid)
    assert (logits(merged) - adapted).norm() < (before - adapted).norm()


def test_training_saves_what_was_trained(tmp_path: Path) -> None:
    for name, slug in (("llama", "W4A16-g32"), ("everywhere", "W3A16-g32-asym")):
        embeddings = {"quantize_embeddings": True} if name == "everywhere" else {}
        model = trainable(made(tmp_path / name, name), slug, **embeddings)
        layer = model.model.layers[0].mlp.down_proj
        start = layer.weight.detach().clone()
        trainer(model, tmp_path / "run", 2).train()
        assert not torch.equal(layer.weight, start) and layer.weight_scale.shape[1] == layer.scheme.groups(
            layer.in_features
        )
        model.save_pretrained(tmp_path / f"{name}-saved")
        again = load(str(tmp_path / f"{name}-saved")).model.layers[0].mlp.down_proj
        assert torch.equal(again.dequantize(torch.float32), layer.quantized("weight").dequantize(torch.float32))
        assert again.scheme.padding and again.in_features == layer.in_features


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_vision_model(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(6, 3, 28, 28)
    tf.SiglipVisionModel(tf.SiglipVisionConfig(**SIGLIP)).save_pretrained(tmp_path / "base")
    data = {"calibration": [{"pixel_values": part} for part in pixels.split(2)]} if method == "gptq" else {}
    config = HfQuantConfig("W4A16-g32", method=method, **data)
    model = tf.SiglipVisionModel.from_pretrained(tmp_path / "base", quantization_config=config)
    fc2 = [m for n, m in model.named_modules() if n.endswith("fc2")]
    assert len(fc2) == 3 and all(isinstance(m, QuantLinear) and m.scheme.padding == 28 for m in fc2)
    model.save_pretrained(tmp_path / "saved")
    again = tf.SiglipVisionModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        one, other = model(pixels).last_hidden_state, again(pixels).last_hidden_state
        twin = model.dequantize()(pixels).last_hidden_state
    assert torch.equal(one, other) and (twin - one).norm() < 1e-4 * one.norm()


def test_nothing_but_zeros_is_expected_behind_the_weight(tmp_path: Path) -> None:
    """Codes of the padding may say anything: inputs are zero there, and nobody sees them."""
    model = quantized(made(tmp_path / "base"))
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(file := tmp_path / "saved" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][:, 52:] = 0xFF
    save_file(tensors, file, metadata={"format": "pt"})
    again = load(str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(
        again.model.layers[0].mlp.down_proj.dequantize(), model.model.layers[0].mlp.down_proj.dequantize()
    )


def test_a_layer_shape_is_checked_against_the_model(tmp_path: Path) -> None:
    quantized(made(tmp_path / "base")).save_pretrained(tmp_path / "saved")
    config = json.loads((file := tmp_path / "saved" / "config.json").read_text())
    config["intermediate_size"] = 104
    file.write_text(json.dumps(config))
    with pytest.raises(HfQuantError, match="shape"):
        load(str(tmp_path / "saved"))
