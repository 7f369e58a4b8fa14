"""A model that computes the same with activations that are harder to quantize: some input channels are much stronger.

    python benchmarks/outlier_variant.py examples/ref-llama-16m OUT

In every decoder layer a share of the channels of each RMSNorm is multiplied by a factor, and the columns of the linear layers
that read them are divided by it. Large models grow such channels by themselves (Dettmers et al., arXiv:2208.07339); small
ones do not. Written in float32, so that the division costs nothing that can be seen in the logits.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def make(folder: Path, out: Path, factor: float = 30, share: float = 0.01, seed: int = 0) -> None:
    """Write the variant of a Llama-like model with one file of weights.

    Args:
        folder: Of the model.
        out: New folder; the tokenizer and texts are copied along.
        factor: How much stronger the channels become.
        share: Of the channels of each norm, at least one of them.
        seed: Which channels.
    """
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    for i in range(config["num_hidden_layers"]):
        for norm, readers in READERS.items():
            weight = tensors[f"model.layers.{i}.{norm}.weight"]
            channels = torch.randperm(len(weight), generator=draw)[: max(1, math.ceil(share * len(weight)))]
            weight[channels] *= factor
            for reader in readers:
                tensors[f"model.layers.{i}.{reader}.weight"][:, channels] /= factor
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "README.md", "train.json"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
