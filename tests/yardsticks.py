"""Tiny models that show what random ones of width 64 hide: made in seconds, always the same.

    folder = make("peaked", tmp_path)     # a model's folder with tokenizer, heldout.txt and calibration.txt

- ``peaked``: trained on its own text until it is certain of the next token. The vocabulary of 512 is larger than the number
  of tokens that evaluation keeps exactly, and half of it is never used.
- ``outliers``: three channels 64 times as strong as the others, in a function that stays the same, and a first token whose
  activation is 1,000 times that of the others.
- ``wide``: widths that are no powers of two (576, 1536) and a vocabulary of 32,000, with embeddings that are tied.
- ``moe``: routed experts beside a shared one (Qwen2-MoE).
- ``seq2seq``: an encoder-decoder (T5).
- ``chat``: trained on conversations in which the model thinks first; heldout.jsonl and calibration.jsonl hold messages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONTEXT = 64
STRONG, FACTOR, MASSIVE = (3, 17, 40), 64.0, 1000.0
SHARPER = 4.0  # logits times that after training: certainty as of a model trained for weeks
_SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA = _SMALL | {"vocab_size": 512, "intermediate_size": 160, "tie_word_embeddings": False}
_MOE = _SMALL | {
    "vocab_size": 512, "intermediate_size": 96, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
_WIDE = _LLAMA | {
    "vocab_size": 32000, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
_T5 = {
    "vocab_size": 512, "d_model": 64, "d_kv": 32, "d_ff": 160, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def text(start: int, paragraphs: int) -> str:
    """Documents of two sentences each, different for every ``start``; a token of it can be foretold from the others."""
    places = ("harbour", "mill", "bridge", "market", "tower", "garden", "station")
    return "\n\n".join(
        f"Walker {n} set out from the {places[n % 7]} at {n % 24} o'clock and reached the {places[n * 3 % 7]}. "
        f"From there it was {n * n % 97} miles to town {n * 7 % 31}, in the rain.<|endoftext|>"
        for n in range(start, start + paragraphs)
    )


def tokenizer() -> Any:
    """One token a byte, with a special token between documents."""
    letters = {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(vocab={"<pad>": 0, "<s>": 1, "<|endoftext|>": 2} | letters, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=bytes_, pad_token="<pad>", bos_token="<s>", eos_token="<|endoftext|>"
    )


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content and enable_thinking | default(true) %}"
    "<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking | default(true) %}<think></think>{% endif %}{% endif %}"
)


def chats(start: int, count: int) -> list[list[dict[str, str]]]:
    """Conversations of one question each, answered after a thought; when each part ends can be foretold."""
    names = ("oak", "elm", "ash", "fir", "yew")
    return [
        [
            {"role": "user", "content": f"{n} {names[n % 5]}?"},
            {"role": "assistant", "reasoning_content": f"{names[n % 5]} {n % 7}", "content": f"{n % 7}."},
        ]
        for n in range(start, start + count)
    ]


def chat_tokenizer() -> Any:
    """`tokenizer` with a chat template and the tokens that it writes."""
    chatting = tokenizer()
    chatting.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chatting.add_tokens(["<think>", "</think>"])
    chatting.eos_token, chatting.chat_template = "<|im_end|>", TEMPLATE
    return chatting


def make(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the yardstick ``kind`` into ``folder``, which may exist; returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[kind]()
    model.to(dtype).save_pretrained(folder)
    if kind == "chat":
        chat_tokenizer().save_pretrained(folder)
        for name, start in (("heldout", 400), ("calibration", 200)):
            lines = (json.dumps({"messages": messages}) for messages in chats(start, 60))
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        return folder
    tokenizer().save_pretrained(folder)
    (folder / "heldout.txt").write_text(text(0, 60))
    (folder / "calibration.txt").write_text(text(1000, 60))
    return folder


def _peaked() -> Any:
    return _trained(torch.tensor(tokenizer()(text(0, 12)).input_ids))


def _chat() -> Any:
    chatting = chat_tokenizer()
    rendered = "".join(chatting.apply_chat_template(chat, tokenize=False) for chat in chats(0, 200))
    model = _trained(torch.tensor(chatting(rendered).input_ids)[: 24 * CONTEXT])
    model.generation_config.eos_token_id = chatting.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return model


def _trained(ids: torch.Tensor) -> Any:
    """A model that was trained on ``ids`` until it is certain of them."""
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**_LLAMA), dtype=torch.float32)
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(150):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.model.norm.weight *= SHARPER
    return model


@torch.no_grad()
def _outliers() -> Any:
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**_LLAMA, initializer_range=0.1), dtype=torch.float32)
    for layer in model.model.layers:
        _strengthen(layer.input_layernorm, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        _strengthen(layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj)
    model.model.embed_tokens.weight[1, 5] = MASSIVE
    return model


def _strengthen(norm: Any, *consumers: Any) -> None:
    """Some channels of a norm's output `FACTOR` times as strong, and the weights that read them as much weaker."""
    columns = list(STRONG)
    norm.weight[columns] *= FACTOR
    for linear in consumers:
        linear.weight[:, columns] /= FACTOR


def _random(auto: Any, config: Any) -> Any:
    config.initializer_range = 0.1
    return auto.from_config(config, dtype=torch.float32)


KINDS = {
    "peaked": _peaked,
    "chat": _chat,
    "outliers": _outliers,
    "wide": lambda: _random(tf.AutoModelForCausalLM, tf.LlamaConfig(**_WIDE)),
    "moe": lambda: _random(tf.AutoModelForCausalLM, tf.Qwen2MoeConfig(**_MOE)),
    "seq2seq": lambda: _random(tf.AutoModelForSeq2SeqLM, tf.T5Config(**_T5)),
}
