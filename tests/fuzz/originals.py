"""The good checkpoints that cases are made from: those of other programs in `golden/fixtures`, and our own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file

from hf_quant import HfQuantConfig

FIXTURES = Path(__file__).parents[1] / "golden" / "fixtures"
LLAMA = {
    "vocab_size": 48, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
MOE = LLAMA | {
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "head_dim": 32,
}
CAUSAL = tf.AutoModelForCausalLM
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (CAUSAL, tf.LlamaConfig(**LLAMA)),
    "tied": (CAUSAL, tf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "moe": (CAUSAL, tf.Qwen3MoeConfig(**MOE)),
    "gpt2": (CAUSAL, tf.GPT2Config(vocab_size=48, n_embd=64, n_layer=1, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0)),
    "bert": (tf.AutoModel, tf.BertConfig(vocab_size=48, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)),
}  # fmt: skip
BOTH = {"quantize_lm_head": True, "quantize_embeddings": True}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "native-4bit": ("llama", {"scheme": "W4A16-g32", "format": "native"}),
    "native-3bit-asym": ("llama", {"scheme": "W3A16-g64-asym"}),
    "native-2bit-asym": ("llama", {"scheme": "W2A16-g16-asym"}),
    "native-8bit": ("llama", {"scheme": "W8A16-g-1", "format": "native"}),
    "native-outliers": ("llama", {"scheme": "W3A16-g128-o1%"}),
    "native-columns": ("llama", {"scheme": "W4A16-g128-o1%-columns", "format": "native"}),
    "native-w8a8": ("llama", {"scheme": "W8A8", "format": "native"}),
    "native-threshold": ("llama", {"scheme": "W8A8-threshold"}),
    "native-w4a8": ("llama", {"scheme": "W4A8-g128"}),
    "native-mixed": ("llama", {"scheme": "W4A16-g32", "format": "native",
                               "overrides": {"*.down_proj": "W8A16-g32", "*.q_proj": None}}),
    "native-tied": ("tied", {"scheme": "W4A16-g32", **BOTH}),
    "native-embeddings": ("llama", {"scheme": "W4A16-g32", **BOTH}),
    "native-moe": ("moe", {"scheme": "W4A16-g32"}),
    "native-gpt2": ("gpt2", {"scheme": "W4A16-g32"}),
    "native-bert": ("bert", {"scheme": "W4A16-g32"}),
    "native-static": ("llama", {"scheme": "W8A8-static", "method": "calibrated", "format": "native",
                                "calibration": torch.arange(128).remainder(48).view(4, 32)}),
    "own-ct-asym": ("llama", {"scheme": "W4A16-g32-asym", "format": "compressed_tensors"}),
    "own-ct-w8a8": ("llama", {"scheme": "W8A8", "format": "compressed_tensors"}),
}  # fmt: skip


@dataclass(frozen=True)
class Original:
    """One good checkpoint: its small files by name, its config, and its tensors."""

    files: dict[str, bytes]
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def make_own(folder: Path) -> None:
    """Write our own checkpoints, each into a folder of its name."""
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    for name, (auto, config) in MODELS.items():
        torch.manual_seed(0)
        auto.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "float" / name)
    for name, (source, how) in OWN.items():
        quantized = MODELS[source][0].from_pretrained(
            folder / "float" / source, quantization_config=HfQuantConfig(**how)
        )
        quantized.save_pretrained(folder / name)


def names(folder: Path) -> list[Path]:
    """Folders of all originals, in an order that does not change; ``folder`` as for `make_own`."""
    return [*sorted(p for p in FIXTURES.iterdir() if p.is_dir()), *(folder / name for name in OWN for _ in range(3))]


@cache
def original(folder: Path) -> Original:
    """What is in a folder; ``expected`` files are those of other tests."""
    files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and "expected" not in p.name}
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        if name.endswith(".safetensors"):
            tensors |= load_file(folder / name)
    config = json.loads(files.pop("config.json"))
    return Original({n: b for n, b in files.items() if ".safetensors" not in n}, config, tensors)
