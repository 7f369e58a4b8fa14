"""Checkpoints of other programs, of kinds beside plain decoders: what runs from them is what runs from ours, bit for bit.

The programs themselves wrote the files that ``tests/golden`` reads; here codes in the same formats stand in models of images and
text, with shared experts, latent attention, and recurrent layers between those of attention.
"""

from pathlib import Path

import pytest
import torch

import hf_quant
from hf_quant.checkpoint.folder import Checkpoint
from hf_quant.jobs.convert import convert
from tests.tiny_models import built, inputs_of, run

KINDS = [
    ("llava", "LlavaForConditionalGeneration"), ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    ("gemma3", "Gemma3ForConditionalGeneration"), ("qwen2_audio", "Qwen2AudioForConditionalGeneration"),
    ("qwen2_moe", "Qwen2MoeForCausalLM"), ("deepseek_v3", "DeepseekV3ForCausalLM"),
    ("qwen3_next", "Qwen3NextForCausalLM"), ("bamba", "BambaForCausalLM"), ("lfm2", "Lfm2ForCausalLM"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "class_name"), KINDS)
def test_gptq_awq_and_compressed_tensors(model_type: str, class_name: str, tmp_path: Path) -> None:
    base = built(model_type, class_name)[0]
    inputs = {
        name: x.bfloat16() if getattr(x, "dtype", None) is torch.float32 else x for name, x in inputs_of(base).items()
    }
    kind = type(base)
    base.bfloat16().save_pretrained(tmp_path / "float")
    config = hf_quant.HfQuantConfig("W4A16-g32-asym", format="native")
    model = kind.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    model.save_pretrained(tmp_path / "native")
    expected, layers = run(model, inputs), len(model.hf_quantizer.plan.schemes)
    for to in ("gptq", "awq", "compressed-tensors"):
        convert(tmp_path / "native", tmp_path / to, to=to)
        tensors = Checkpoint.open(tmp_path / to).tensors
        assert any(name.endswith((".qweight", ".weight_packed")) for name in tensors)
        again, info = kind.from_pretrained(
            tmp_path / to, quantization_config=hf_quant.HfQuantConfig(), output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert len(again.hf_quantizer.plan.schemes) == layers
        assert torch.equal(run(again.eval(), inputs), expected), to
