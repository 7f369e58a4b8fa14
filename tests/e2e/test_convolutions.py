"""Convolutions over patches that do not overlap are linear maps: found, quantized by every method, saved, trained and converted."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_quant import HfQuantConfig, load
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.cli import main
from hf_quant.core.geometry import Patches, geometry_of, patches_of, weight_of
from hf_quant.errors import FormatError, HfQuantError, PlanError
from hf_quant.evaluation.layers import layer_errors
from hf_quant.evaluation.sensitivity import rounded
from hf_quant.hf.blocks import blocks_of
from hf_quant.hf.plan import make_plan
from hf_quant.jobs.convert import convert
from hf_quant.methods import method as method_named
from hf_quant.nn import QuantLinear, QuantMatrix, QuantPatches
from hf_quant.nn._requantizing import requantize
from hf_quant.publish.replay import replay
from hf_quant.training.scales import trainable_scales
from tests.architectures import check_calibration, check_rounding, saved
from tests.tiny_models import relative, run

RESNET = tf.ResNetConfig(embedding_size=48, hidden_sizes=[96, 192], depths=[1, 2], num_labels=5)
VIT = tf.ViTConfig(
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=28,
    patch_size=7,
    num_channels=2,
)
PATCHES = "vit.embeddings.patch_embeddings.projection"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet, nearly half of which are convolutions of size 1, one with stride 2; those of 24 and 48 channels need padding."""
    torch.manual_seed(0)
    model = tf.ResNetForImageClassification(RESNET)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    folder = tmp_path_factory.mktemp("resnet") / "float"
    model.save_pretrained(folder)
    return folder


def quantized(folder: Path, slug: str = "W4A16-g32", **how: Any) -> Any:
    return tf.ResNetForImageClassification.from_pretrained(
        folder, quantization_config=HfQuantConfig(slug, **how)
    ).eval()


def images(seed: int = 0, count: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 40, 32, generator=torch.Generator().manual_seed(seed))}


def convolutions(model: nn.Module) -> dict[str, QuantPatches]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantPatches)}


CASES = [
    (nn.Conv1d(6, 8, 1), (2, 6, 9)), (nn.Conv1d(6, 8, 3, 4, bias=False), (2, 6, 17)), (nn.Conv2d(3, 8, (4, 2), (4, 3)), (2, 3, 17, 11)),
    (nn.Conv2d(3, 8, 1, 2), (3, 5, 7)), (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), (2, 3, 4, 8, 12)), (nn.Conv2d(3, 8, 1, dilation=3), (1, 3, 2, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("convolution", "shape"), CASES)
def test_a_geometry_gives_the_product_that_the_convolution_is(convolution: Any, shape: tuple[int, ...]) -> None:
    x, geometry = torch.randn(shape), geometry_of(convolution)
    assert isinstance(geometry, Patches)
    rows, weight = geometry.rows(x), weight_of(convolution)
    assert rows.shape[-1] == weight.shape[1] == geometry.columns
    y = geometry.output(nn.functional.linear(rows, weight, convolution.bias))
    assert y.is_contiguous()
    torch.testing.assert_close(y, convolution(x))
    assert torch.equal(geometry.weight(weight), convolution.weight)
    other = torch.randn_like(rows)
    assert torch.equal(geometry.rows(geometry.with_rows(x, other)), other)
    some = torch.randn(2, 5, geometry.columns)
    assert torch.equal(geometry.rows(geometry.input(some)).flatten(1, -2), some)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 4, 2), nn.Conv2d(3, 8, 4, (4, 3)), nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(3, 8, 4, 4, padding=1),
        nn.Conv2d(3, 8, 2, 4, dilation=2), nn.Conv1d(3, 8, 3, padding="same"), nn.ConvTranspose2d(3, 8, 2, 2),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 8, 1)), nn.Linear(3, 8), nn.BatchNorm2d(3),
    ],
)  # fmt: skip
def test_what_is_no_linear_map_of_patches_is_told_apart(module: nn.Module) -> None:
    assert patches_of(module) is None


def test_all_that_a_user_does_with_a_model_of_convolutions(base: Path, tmp_path: Path) -> None:
    kind, inputs = saved(tf.ResNetForImageClassification.from_pretrained(base).eval(), tmp_path)  # type: ignore[misc]
    found = check_rounding(kind, inputs, tmp_path)
    assert not found.faults and found.numbers["layers"] == 8


def test_a_quantized_convolution_is_a_drop_in(base: Path) -> None:
    floats = dict(tf.ResNetForImageClassification.from_pretrained(base).named_modules())
    model = quantized(base, "W8A16-g32")
    layers = convolutions(model)
    assert len(layers) == 8 and any(layer.stride == (2, 2) for layer in layers.values())
    for name, layer in layers.items():
        old: Any = floats[name]
        for what in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(layer, what) == getattr(old, what)
        assert layer.weight.shape == old.weight.shape and not isinstance(layer, nn.Linear)
        x = torch.randn(2, old.in_channels, 6, 5)
        torch.testing.assert_close(
            layer(x), nn.functional.conv2d(x, layer.weight + 0, layer.bias, layer.stride), atol=1e-4, rtol=1e-4
        )
        assert relative(layer(x), old(x).detach()) < 0.02
    expected = run(model, images())
    copied = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    copied.load_state_dict(torch.load(stream))
    assert torch.equal(run(copied, images()), expected)
    assert (
        relative(run(copied.bfloat16(), {"pixel_values": images()["pixel_values"].bfloat16()}).float(), expected)
        < 0.03
    )
    dense = model.dequantize()
    assert {name: type(module) for name, module in dense.named_modules()} == {n: type(m) for n, m in floats.items()}
    assert relative(run(dense, images()), expected) < 1e-5


@pytest.mark.parametrize(
    ("method", "slug"),
    [
        ("gptq", "W4A16-g32-o2%"), ("calibrated", "W2A16-g32-asym"), ("calibrated", "W8A8"), ("awq", "W4A16-g64"),
        ("smoothquant+rtn", "W8A8"), ("hadamard+gptq", "W4A16-g32"), ("calibrated", "W4A8-g32"),
    ],
)  # fmt: skip
def test_every_method_in_memory_and_from_shards(base: Path, tmp_path: Path, method: str, slug: str) -> None:
    (tmp_path / "float").symlink_to(base)
    kind, inputs = tf.ResNetForImageClassification, images()
    found = check_calibration(kind, inputs, tmp_path, slug, method)
    assert not found.faults and found.numbers["error"] < (1.0 if "W2" in slug else 0.5)


@pytest.mark.parametrize(("method", "slug"), [("hqq", "W3A16-g32-asym"), ("gptq", "W8A8-static-o2%-columns")])
def test_methods_and_schemes_of_their_own(base: Path, tmp_path: Path, method: str, slug: str) -> None:
    model = quantized(
        base, slug, method=method, **({} if method == "hqq" else {"calibration": [images(seed) for seed in range(3)]})
    )
    expected = run(tf.ResNetForImageClassification.from_pretrained(base).eval(), images())
    assert relative(run(model, images()), expected) < 0.4
    model.save_pretrained(tmp_path)
    assert torch.equal(run(load(str(tmp_path)), images()), run(model, images()))


def test_learned_codes_of_convolutions_within_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.Wav2Vec2ConformerConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, conv_dim=(32, 32), conv_kernel=(10, 3),
        conv_stride=(5, 2), num_feat_extract_layers=2, conv_depthwise_kernel_size=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        apply_spec_augment=False, position_embeddings_type=None,
    )  # fmt: skip
    tf.Wav2Vec2ConformerForCTC(config).save_pretrained(tmp_path / "float")
    inputs = {"input_values": torch.randn(2, 1600)}
    for slug in ("W3A16-g32", "W8A8"):
        folder = tmp_path / slug
        folder.mkdir()
        (folder / "float").symlink_to(tmp_path / "float")
        found = check_calibration(tf.Wav2Vec2ConformerForCTC, inputs, folder, slug, "learned")
        assert not found.faults and found.numbers["error"] < 1.2 * found.numbers["error of rounding"]
        recipe = [
            file
            for file in (folder / "stream").glob("*.safetensors")
            if any("pointwise" in n for n in load_file(file))
        ]
        assert recipe


def test_convolutions_before_an_encoder_do_not_keep_its_blocks_from_being_followed() -> None:
    config = tf.Wav2Vec2Config(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, conv_dim=(32, 64), conv_kernel=(10, 2),
        conv_stride=(5, 2), num_feat_extract_layers=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.Wav2Vec2ForCTC(config)
    plan = make_plan(model, HfQuantConfig("W4A16-g32", method="calibrated"))
    assert plan.convolutions == ["wav2vec2.feature_extractor.conv_layers.1.conv"]
    assert list(blocks_of(model, plan)) == ["wav2vec2.encoder.layers.0", "wav2vec2.encoder.layers.1"]


def test_few_convolutions_stay_unless_they_are_named() -> None:
    with torch.device("meta"):
        model = tf.ViTForImageClassification(VIT)
    plan = make_plan(model, HfQuantConfig("W4A16-g32"))
    assert plan.format == "compressed_tensors" and plan.convolutions == []
    assert plan.left[PATCHES].startswith("a convolution, and all are less than 5% of the weights to quantize")
    share = plan.kept[PATCHES] / plan.params
    assert f"{PATCHES} ({share:.2%} of the parameters): a convolution" in plan.summary()
    named = make_plan(model, HfQuantConfig("W4A16-g32", overrides={"*projection": "W8A16-g32"}))
    assert named.format == "native" and named.convolutions == [PATCHES]
    assert str(named.schemes[PATCHES]) == "W8A16-g32-pad30"
    with pytest.raises(PlanError, match="cannot hold this plan"):
        make_plan(
            model, HfQuantConfig("W4A16-g32", format="compressed_tensors", overrides={"*projection": "W8A16-g32"})
        )
    assert make_plan(model, HfQuantConfig("W4A16-g32", overrides={"*projection": None})).left[PATCHES] == "as asked"


def test_formats_of_others_keep_convolutions_in_floating_point() -> None:
    config = tf.Wav2Vec2ConformerConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.device("meta"):
        model = tf.Wav2Vec2ConformerForCTC(config)
    plan = make_plan(model, HfQuantConfig("W4A16-g32", format="compressed_tensors"))
    assert not plan.convolutions and any(
        reason == "a convolution; format='native' holds it" for reason in plan.left.values()
    )
    assert make_plan(model, HfQuantConfig("W4A16-g32")).convolutions
    assert any("whose patches overlap" in reason for reason in plan.others.values())


def test_conversion(base: Path, tmp_path: Path) -> None:
    model = quantized(base)
    model.save_pretrained(tmp_path / "q")
    stored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert set(stored["convolutions"]) == set(convolutions(model))
    convert(tmp_path / "q", tmp_path / "dense", to="dense")
    dense = tf.ResNetForImageClassification.from_pretrained(tmp_path / "dense").eval()
    assert relative(run(dense, images()), run(model, images())) < 1e-5
    convert(tmp_path / "q", tmp_path / "again", to="native")
    assert torch.equal(run(load(str(tmp_path / "again")), images()), run(model, images()))
    with pytest.raises(FormatError, match="a convolution, and this format holds linear layers; --to dense"):
        convert(tmp_path / "q", tmp_path / "no", to="compressed-tensors")
    for wrong in ("all", [1], {"a": 1}):
        (tmp_path / "q" / "config.json").write_text(
            json.dumps(
                {
                    **RESNET.to_dict(),
                    "architectures": ["ResNetForImageClassification"],
                    "quantization_config": {**stored, "convolutions": wrong},
                }
            )
        )
        with pytest.raises(HfQuantError, match="convolutions"):
            load(str(tmp_path / "q"))


def test_sensitivity_rounds_what_the_layer_rounds(base: Path) -> None:
    model = quantized(base, "W8A8")
    names = list(convolutions(model))
    floats = tf.ResNetForImageClassification.from_pretrained(base).eval()
    before = run(floats, images())
    with rounded(floats, names, model.hf_quantizer.plan.schemes[names[0]], method_named("rtn")):
        assert relative(run(floats, images()), run(model, images())) < 0.02
    assert torch.equal(run(floats, images()), before)


def test_kernels_are_compared_and_errors_of_layers_are_measured(base: Path) -> None:
    for slug in ("W4A16-g32", "W8A8"):
        model = quantized(base, slug)
        errors = replay(model).errors
        assert set(errors) == set(convolutions(model)) and max(errors.values()) < 1e-2
    measured = {error.layer: error.error for error in layer_errors(model, Checkpoint.open(base))}
    assert set(measured) == set(convolutions(model)) and max(measured.values()) < 0.02


def test_scales_are_trained_and_codes_are_set(base: Path) -> None:
    model = quantized(base)
    expected = run(model, images())
    with trainable_scales(model) as scales:
        loss = (logits := model(**images()).logits).square().sum()
        loss.backward()
        torch.testing.assert_close(logits.detach(), expected, atol=1e-4, rtol=1e-4)
        assert len(scales) == 8 and all(scale.grad is not None and bool(scale.grad.any()) for scale in scales.values())
    name, layer = next(iter(convolutions(model).items()))
    weight = layer.weight + 0.0
    requantize(layer, "weight", weight.flip(0))
    assert relative(layer.dequantize().view(weight.shape), weight.flip(0)) < 0.3, name


def test_training(base: Path, tmp_path: Path) -> None:
    model = tf.ResNetForImageClassification.from_pretrained(
        base, quantization_config=HfQuantConfig("W4A8-g32", training=True)
    )
    optimizer, before = (
        torch.optim.SGD(model.parameters(), 0.1),
        model.train()(**images(), labels=torch.tensor([0, 1])).loss,
    )
    before.backward()
    optimizer.step()
    names = [
        name
        for name, parameter in model.named_parameters()
        if name.endswith("weight_scale") and bool(parameter.grad.any())
    ]
    assert len(names) == 8
    expected = run(model.eval(), images())
    model.save_pretrained(tmp_path)
    again = tf.ResNetForImageClassification.from_pretrained(tmp_path).eval()
    assert len(convolutions(again)) == 8
    assert relative(run(again, images()), expected) < 0.01


def test_adapters_leave_convolutions_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tf.ViTForImageClassification(VIT).save_pretrained(tmp_path)
    config = HfQuantConfig("W4A16-g32", overrides={"*projection": "W8A16-g32"})
    model = tf.ViTForImageClassification.from_pretrained(tmp_path, quantization_config=config)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    wrapped = {type(module.base_layer) for module in adapted.modules() if hasattr(module, "base_layer")}
    assert QuantPatches not in wrapped and QuantLinear in wrapped and len(convolutions(adapted)) == 1
    assert run(adapted, {"pixel_values": torch.randn(1, 2, 28, 28)}).isfinite().all()
    assert sum(isinstance(module, QuantMatrix) for module in adapted.modules()) == 1 + 6 * 3


def test_a_text_to_calibrate_on_is_refused_for_what_it_is(tmp_path: Path) -> None:
    """And not for its length, which a longer one would only change into this refusal."""
    tf.ViTForImageClassification(VIT).save_pretrained(tmp_path / "vit")
    (tmp_path / "text.txt").write_text("a few words")
    call = ["quantize", str(tmp_path / "vit"), "-o", str(tmp_path / "q"), "--method", "gptq", "--scheme", "W4A16-g16"]
    refused = CliRunner().invoke(main, [*call, "--calibration", str(tmp_path / "text.txt")])
    assert refused.exit_code == 2 and "reads pixel_values" in refused.stderr, refused.stderr
