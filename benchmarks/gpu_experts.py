"""Layers of experts on a GPU: ours in four and eight bits beside transformers' own in bf16.

    python benchmarks/gpu_experts.py [--rows FILE]
    python benchmarks/gpu_experts.py --dry-run

The shapes are those of Mixtral 8x7B (8 experts, two chosen) and Qwen3-30B-A3B (128 experts, eight chosen). Microseconds of the
whole layer for 1 to 2,048 tokens that are routed at random, and the error against the dequantized experts.
"""

import gc
from functools import partial
from typing import Any

import torch
from _gpu import Rows, device_for, gigabytes, parser, reset_peak, seconds
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.formats import format_named
from hf_quant.methods import method
from hf_quant.nn import as_quant_experts
from hf_quant.nn._weight import frozen
from hf_quant.nn.experts import stacks

SCHEMES = ("W4A16-g128", "W8A16-g128", "W4A16-g32-asym")
TOKENS = (1, 8, 64, 512, 2048)


def layers(dry_run: bool) -> dict[str, tuple[type[nn.Module], Any]]:
    """Class and config of each."""
    if dry_run:
        small = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts_per_tok": 2}
        return {
            "mixtral": (MixtralExperts, MixtralConfig(**small, intermediate_size=256, num_local_experts=4)),
            "qwen3-moe": (Qwen3MoeExperts, Qwen3MoeConfig(**small, moe_intermediate_size=128, num_experts=8)),
        }
    return {
        "mixtral": (MixtralExperts, MixtralConfig()),
        "qwen3-moe": (Qwen3MoeExperts, Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8, hidden_size=2048, moe_intermediate_size=768)),
    }  # fmt: skip


def dense(kind: type[nn.Module], config: Any, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    config._experts_implementation = "grouped_mm" if device.type == "cuda" else "eager"
    with device:
        layer = kind(config).to(torch.bfloat16)
        for weight in layer.parameters():
            nn.init.normal_(weight, std=0.02)
    return layer.requires_grad_(False)


def quantized(layer: nn.Module, slug: str) -> nn.Module:
    """The layer with codes in place of its weights."""
    scheme = QuantScheme.parse(slug)
    weights = {
        name: QuantizedTensor.stack(
            [method("rtn", steps=0).quantize(one.float(), scheme, torch.bfloat16) for one in getattr(layer, name)]
        )
        for name in stacks(layer)
    }
    as_quant_experts(layer, dict.fromkeys(weights, scheme), quantized=True)
    for name, weight in weights.items():
        for local, tensor in format_named("native").write(weight).items():
            setattr(layer, name + local.removeprefix("weight"), frozen(tensor))
    layer.choose_kernel()  # type: ignore[operator]
    return layer


def routed(tokens: int, experts: int, top_k: int, hidden: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.rand(tokens, experts, device=device).topk(top_k, dim=-1).indices
    weights = torch.rand(tokens, top_k, device=device).softmax(-1).to(torch.bfloat16)
    return torch.randn(tokens, hidden, device=device).to(torch.bfloat16), chosen, weights


def measure(
    rows: Rows, model: str, scheme: str, layer: nn.Module, config: Any, device: torch.device, few: bool
) -> None:
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    for tokens in TOKENS[:3] if few else TOKENS:
        inputs = routed(tokens, experts, config.num_experts_per_tok, config.hidden_size, device)

        def cell(inputs: tuple[Tensor, Tensor, Tensor] = inputs) -> dict[str, Any]:
            return {"us": 1e6 * seconds(partial(layer, *inputs), device, repeats=9, warm=3), **gigabytes(device)}

        rows.attempt({"model": model, "scheme": scheme, "tokens": tokens}, cell)


def error(kind: type[nn.Module], config: Any, scheme: str, device: torch.device) -> dict[str, Any]:
    """Of the layer with codes, against the layer with the weights that they mean."""
    exact, ours = dense(kind, config, device), quantized(dense(kind, config, device), scheme)
    for name in stacks(exact):
        getattr(exact, name).data.copy_(ours.float_weight(name, torch.bfloat16))  # type: ignore[operator]
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    inputs = routed(16, experts, config.num_experts_per_tok, config.hidden_size, device)
    expected, found = exact(*inputs).double(), ours(*inputs).double()
    return {"error": float((found - expected).norm() / expected.norm())}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    rows, device = Rows("experts", arguments.rows), device_for(arguments.dry_run)
    with torch.inference_mode():
        for model, (kind, config) in layers(arguments.dry_run).items():
            layer = dense(kind, config, device)
            measure(rows, model, "bf16", layer, config, device, arguments.dry_run)
            del layer
            for scheme in SCHEMES:
                reset_peak(device)
                rows.attempt({"model": model, "scheme": scheme}, partial(error, kind, config, scheme, device))
                gc.collect()
                layer = quantized(dense(kind, config, device), scheme)
                measure(rows, model, scheme, layer, config, device, arguments.dry_run)
                del layer
                gc.collect()


if __name__ == "__main__":
    main()
