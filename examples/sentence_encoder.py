"""Quantize an encoder of sentences, its table of words too, and see whether its vectors still mean the same.

python examples/sentence_encoder.py MODEL [SCHEME]      # for example: ... sentence-transformers/all-MiniLM-L6-v2 W8A16-g128

In sentence-transformers: SentenceTransformer(MODEL, model_kwargs={"quantization_config": HfQuantConfig(...)}).
"""

import sys

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hf_quant import HfQuantConfig

SENTENCES = [
    "The cat sleeps on the sofa.", "A cat is asleep on the couch.", "The file could not be opened.",
    "Opening the file failed.", "Stocks rose sharply today.", "It rained all night.",
]  # fmt: skip

if len(sys.argv) < 2:
    sys.exit(__doc__)
name, scheme = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "W8A16-g32"
inputs = AutoTokenizer.from_pretrained(name)(SENTENCES, padding=True, return_tensors="pt")


def vectors(model: torch.nn.Module) -> Tensor:
    """Mean of the last states of all tokens that are no padding, of length 1."""
    with torch.no_grad():
        states, mask = model(**inputs).last_hidden_state, inputs.attention_mask[..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


base = AutoModel.from_pretrained(name)
small = AutoModel.from_pretrained(name, quantization_config=HfQuantConfig(scheme, quantize_embeddings=True))
before, after = vectors(base), vectors(small)
print(f"{base.get_memory_footprint() / 1e6:.2f} MB -> {small.get_memory_footprint() / 1e6:.2f} MB")
print(f"cosine to the vectors of the base: {(before * after).sum(-1).mean():.4f}")
moved = (before @ before.T - after @ after.T).abs().max()
print(f"largest change of a similarity between two sentences: {moved:.4f}")
