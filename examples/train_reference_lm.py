"""Train a small Llama-architecture language model to measure quantization on. Runs on a CPU or one GPU.

    python train_reference_lm.py --corpus corpus/ --out ref --minutes 10 --hidden 512 --layers 8 --heads 8 --kv 4 --ffn 1408

Trains a byte-level BPE tokenizer (8192) on train.txt, then the model for the given minutes: Muon for matrices,
AdamW for the rest, constant learning rate for 40 % of the time, then linear to zero. Saves bf16 safetensors + tokenizer.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, EOT = 8192, "<|endoftext|>"


def tokenizer_and_ids(corpus: Path):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train(
        [str(corpus / "train.txt")],
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOT], initial_alphabet=alphabet),
    )
    ids = {}
    for split in ("train", "valid"):
        docs = [d.strip("\n") + "\n" for d in (corpus / f"{split}.txt").read_text().split(EOT) if d.strip()]
        ids[split] = np.concatenate([np.array([0, *e.ids], dtype=np.uint16) for e in tok.encode_batch(docs)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token=EOT, bos_token=EOT, pad_token=EOT, model_max_length=1024
    )
    return fast, ids


@torch.no_grad()
def muon_step(params, momenta, lr, beta=0.95):
    """Momentum, then the nearest orthogonal matrix by five Newton-Schulz steps (Jordan et al., 2024)."""
    for p, m in zip(params, momenta, strict=True):
        m.mul_(beta).add_(p.grad)
        u = p.grad.add(m, alpha=beta).bfloat16()
        tall = u.shape[0] > u.shape[1]
        x = (u.T if tall else u) / (u.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
        x = x.T if tall else x
        p.mul_(1 - lr * 0.02).add_(x.float(), alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)
        p.grad = None


def main(a):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, ids = tokenizer_and_ids(a.corpus)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv,
        intermediate_size=a.ffn,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(device)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02 if "embed" in name else 0.7 / math.sqrt(p.shape[1]))
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    adam = torch.optim.AdamW(rest, lr=a.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    momenta = [torch.zeros_like(p) for p in matrices]
    rng = np.random.default_rng(0)

    def loss_of(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(x).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), x[:, 1:].flatten())

    start, step, tokens = time.time(), 0, 0
    while (done := (time.time() - start) / (60 * a.minutes)) < 1:
        at = rng.integers(0, len(ids["train"]) - a.context - 1, a.batch)
        x = torch.from_numpy(np.stack([ids["train"][i : i + a.context] for i in at]).astype(np.int64)).to(device)
        loss = loss_of(x)
        loss.backward()
        scale = min(1, (step + 1) / 40) * min(1, (1 - done) / 0.6)
        muon_step(matrices, momenta, a.lr * scale)
        for group in adam.param_groups:
            group["lr"] = a.adam_lr * scale
        adam.step()
        adam.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + x.numel()
        if step % 50 == 0:
            print(f"step {step} {tokens / 1e6:.1f}M tokens loss {loss.item():.3f} {100 * done:.0f}%", flush=True)

    model.eval()
    held = torch.from_numpy(ids["valid"][: 256 * a.context].astype(np.int64)).view(-1, a.context)
    with torch.no_grad():
        valid = float(np.mean([loss_of(held[i : i + 8].to(device)).item() for i in range(0, len(held), 8)]))
    print(f"valid loss {valid:.4f} perplexity {math.exp(valid):.2f}")
    model.to(torch.bfloat16).save_pretrained(a.out)
    tokenizer.save_pretrained(a.out)
    (a.out / "train.json").write_text(json.dumps({"steps": step, "tokens": tokens, "valid_loss": valid}))


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--corpus", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--minutes", type=float, default=60)
    sizes = {"hidden": 384, "layers": 8, "heads": 6, "kv": 2, "ffn": 1024, "context": 512, "batch": 16}
    for name, value in sizes.items():
        ap.add_argument(f"--{name}", type=int, default=value)
    ap.add_argument("--lr", type=float, default=0.02)
    ap.add_argument("--adam-lr", type=float, default=3e-3)
    main(ap.parse_args())
