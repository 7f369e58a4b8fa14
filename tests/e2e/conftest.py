"""Tiny models with random weights, one for each kind of architecture, saved once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

IDS = torch.arange(1, 17)[None]
SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
MOE = DECODER | {"intermediate_size": 64, "head_dim": 32, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Arch:
    """How to make a tiny model, and how to run it."""

    auto: Any
    config: Any
    seq2seq: bool = False

    def run(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            out = model(input_ids=IDS, decoder_input_ids=IDS) if self.seq2seq else model(input_ids=IDS)
        made = out.logits if hasattr(out, "logits") else out.last_hidden_state
        assert isinstance(made, torch.Tensor)
        return made


CAUSAL = tf.AutoModelForCausalLM
ZOO = {
    "llama": Arch(CAUSAL, tf.LlamaConfig(**DECODER, tie_word_embeddings=False)),
    "llama-tied": Arch(CAUSAL, tf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "qwen3": Arch(CAUSAL, tf.Qwen3Config(**DECODER, head_dim=32)),
    "mistral": Arch(CAUSAL, tf.MistralConfig(**DECODER)),
    "phi3": Arch(CAUSAL, tf.Phi3Config(**DECODER, pad_token_id=0)),
    "gemma2": Arch(CAUSAL, tf.Gemma2Config(**DECODER, head_dim=32)),
    "gpt2": Arch(CAUSAL, tf.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=2, n_positions=64)),
    "bert-mlm": Arch(tf.AutoModelForMaskedLM, tf.BertConfig(**SMALL, intermediate_size=128)),
    "bert-classifier": Arch(tf.AutoModelForSequenceClassification, tf.BertConfig(**SMALL, intermediate_size=128)),
    "bert-encoder": Arch(tf.AutoModel, tf.BertConfig(**SMALL, intermediate_size=128)),
    "t5": Arch(
        tf.AutoModelForSeq2SeqLM,
        tf.T5Config(
            vocab_size=256, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
        seq2seq=True,
    ),
    "mixtral": Arch(CAUSAL, tf.MixtralConfig(**MOE, num_local_experts=4)),
    "qwen3-moe": Arch(CAUSAL, tf.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=32)),
    "gpt-oss": Arch(CAUSAL, tf.GptOssConfig(**MOE, num_local_experts=4)),
    "llava": Arch(
        tf.AutoModelForImageTextToText,
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
            text_config=tf.LlamaConfig(**DECODER),
            image_token_index=255,
        ),
    ),
}


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``zoo(name)`` is ``(arch, folder)`` of a saved bf16 model."""
    root, made = tmp_path_factory.mktemp("zoo"), {}

    def get(name: str) -> tuple[Arch, Path]:
        if name not in made:
            torch.manual_seed(0)
            model = ZOO[name].auto.from_config(ZOO[name].config, dtype=torch.bfloat16)
            model.save_pretrained(root / name)
            made[name] = root / name
        return ZOO[name], made[name]

    return get


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte-level tokenizer and a held-out text beside it."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("tiny") / "tiny"
    config = tf.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)
    (out / "heldout.txt").write_text("some words to measure on, again and again\n" * 40)
    return out
