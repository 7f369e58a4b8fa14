"""A fixed sample of architectures, one of each kind that needed something of its own; `benchmarks/architectures.py` runs all."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.falcon.modeling_falcon import FalconLinear

from hf_quant.hf.candidates import why_not_plain
from tests import reported_architectures as reported
from tests.architectures import check_calibration, check_rounding, saved
from tests.tiny_models import built

# older versions of transformers use it in models of speech
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

ROUNDED = [
    # a subclass of nn.Linear that computes as it; weights rescaled in place; two layers that are one weight; experts that are
    # transposed on loading, always or where they have to be; weights that are fused, renamed or split on loading
    ("falcon", "FalconForCausalLM"), ("rwkv", "RwkvForCausalLM"), ("neomme", "NeoMMEForMaskedLM"),
    ("aria_text", "AriaTextForCausalLM"), ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    ("gte", "GteForMaskedLM"), ("tipsv2_text_model", "Tipsv2TextModel"), ("nomic_bert", "NomicBertForMaskedLM"),
    ("jina_embeddings_v3", "JinaEmbeddingsV3ForMaskedLM"), ("git", "GitForCausalLM"),
    # images and sounds: two towers, convolutions that are linear maps, attributes that a model reads of its layers
    ("clip", "CLIPForImageClassification"), ("owlvit", "OwlViTModel"), ("radio", "RadioModel"),
    ("vit", "ViTForImageClassification"), ("blip", "BlipForConditionalGeneration"),
    ("vision-text-dual-encoder", "VisionTextDualEncoderModel"), ("data2vec-audio", "Data2VecAudioForCTC"),
    ("hubert", "HubertForCTC"), ("moonshine", "MoonshineForConditionalGeneration"),
    ("glpn", "GLPNModel"), ("sapiens2", "Sapiens2Model"),
    # Conv1D; a state-space model; stacks of experts; shared experts; hashes of bytes
    ("openai-gpt", "OpenAIGPTLMHeadModel"), ("mamba", "MambaForCausalLM"), ("mixtral", "MixtralForCausalLM"),
    ("gpt_oss", "GptOssForCausalLM"), ("dots1", "Dots1ForCausalLM"), ("blt", "BltForCausalLM"),
]  # fmt: skip
CALIBRATED = [
    # an encoder before a decoder; a position bias that the first block computes; cross-attention that no text reaches; an encoder;
    # a classifier; the text decoder of a vision-language model; layers outside the blocks; characters in place of a vocabulary;
    # a cache that the model makes by itself
    ("bart", "BartForConditionalGeneration"), ("t5", "T5ForConditionalGeneration"), ("bart", "BartForCausalLM"),
    ("bert", "BertForSequenceClassification"), ("llava", "LlavaForConditionalGeneration"),
    ("gemma4_text", "Gemma4ForCausalLM"), ("canine", "CanineForSequenceClassification"),
    ("flaubert", "FlaubertWithLMHeadModel"),
    # what one block hands to the next, by name and by place; embeddings that return a pair; a fused weight that is split into
    # unequal parts; ALiBi; a recurrent state; names that only become unknown by their conversion;
    # weights that begin at any byte of their file; products of tensors that are not contiguous
    ("hy_v4", "HYV4ForCausalLM"), ("longt5", "LongT5ForConditionalGeneration"),
    ("prophetnet", "ProphetNetForCausalLM"), ("molmo2_text", "Molmo2TextModel"), ("bloom", "BloomForCausalLM"),
    ("recurrent_gemma", "RecurrentGemmaForCausalLM"), ("deepseek_v4", "DeepseekV4ForCausalLM"),
    ("inkling2_text", "Inkling2ForCausalLM"), ("led", "LEDForConditionalGeneration"),
    # images and sounds: a tower, an encoder before a decoder, a position bias of the first block, a tower beside another one;
    # patches without an axis of samples; an output in tuples of tuples
    ("vit", "ViTForImageClassification"), ("whisper", "WhisperForConditionalGeneration"), ("wavlm", "WavLMForCTC"),
    ("clip", "CLIPForImageClassification"), ("qwen3_vl_vision", "Qwen3VLVisionModel"),
    ("mgp-str", "MgpstrForSceneTextRecognition"),
    # models that are calibrated as a whole: a block that is run again and again; two such lists in turns; convolutions around the
    # only layers; no list of blocks; sequences in the second axis; a length that depends on values
    ("albert", "AlbertForMaskedLM"), ("hrm_text", "HrmTextForCausalLM"),
    ("squeezebert", "SqueezeBertForSequenceClassification"), ("sam3_lite_text_text_model", "Sam3LiteTextTextModel"),
    ("xlnet", "XLNetLMHeadModel"), ("fsmt", "FSMTForConditionalGeneration"),
    ("fastspeech2_conformer", "FastSpeech2ConformerModel"),
]  # fmt: skip


def made(model_type: str, class_name: str, folder: Path) -> tuple[Any, Any]:
    """What `saved` gives of a model; a class that this version of transformers does not have yet is skipped."""
    if not hasattr(transformers, class_name) or model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {class_name} of {model_type}")
    if model_type == "vision-text-dual-encoder" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip(f"transformers {transformers.__version__} has no default configuration of {model_type}")
    base = saved(built(model_type, class_name)[0], folder)
    assert base is not None
    return base


@pytest.mark.parametrize(("model_type", "class_name"), [*ROUNDED, *reported.ROUNDED])
def test_rounding(model_type: str, class_name: str, tmp_path: Path) -> None:
    base = made(model_type, class_name, tmp_path)
    found = check_rounding(*base, tmp_path, ("W4A16-g32",))
    assert not found.faults and found.numbers["layers"]


@pytest.mark.parametrize(("model_type", "class_name"), [*CALIBRATED, *reported.CALIBRATED])
def test_calibration_in_memory_and_from_shards(model_type: str, class_name: str, tmp_path: Path) -> None:
    base = made(model_type, class_name, tmp_path)
    found = check_calibration(*base, tmp_path)
    assert not found.faults


@pytest.mark.parametrize(("model_type", "class_name"), reported.NOTHING)
def test_a_model_says_that_there_is_nothing_to_quantize(model_type: str, class_name: str, tmp_path: Path) -> None:
    found = check_rounding(*made(model_type, class_name, tmp_path), tmp_path, ("W4A16-g32",))
    assert not found.faults and found.numbers["nothing"].startswith(f"PlanError: nothing to quantize in {class_name}")


def test_training_block_by_block_needs_blocks(tmp_path: Path) -> None:
    found = check_calibration(*made("albert", "AlbertForMaskedLM", tmp_path), tmp_path, method="learned")
    assert found.faults["memory"].startswith(
        "PlanError: albert.encoder.albert_layer_groups.0: is run more than once, and"
    )


class Plain(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 64)
        self.unused = "of its own"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Scaled(Plain):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Pair(Plain):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input), input  # type: ignore[return-value]


class Points(nn.Conv2d):
    unused = "of its own"


class ScaledPoints(nn.Conv2d):
    def _conv_forward(self, *arguments: torch.Tensor | None) -> torch.Tensor:
        return 2 * super()._conv_forward(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_map_is_told_by_what_it_computes(dtype: torch.dtype) -> None:
    """Whatever the default dtype is: in ``from_pretrained`` it is the model's."""
    why_not_plain.cache_clear()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        _told_by_what_it_computes()
    finally:
        torch.set_default_dtype(default)


def _told_by_what_it_computes() -> None:
    for plain in (nn.Linear, Plain, FalconLinear, nn.Conv1d, nn.Conv3d, Points):
        assert why_not_plain(plain) is None
    for kind in (Scaled, Pair, ScaledPoints):
        assert why_not_plain(kind) == f"{kind.__name__} computes with its weight in its own way"
