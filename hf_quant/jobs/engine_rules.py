"""What engines accept besides vLLM on NVIDIA GPUs (`hf_quant.jobs.engines`), as data: formats, schemes, and shapes of layers.

vLLM's rules are those of 0.32.0, read in ``kernels/linear/mixed_precision`` and ``compressed_tensors.py`` there; its products on
CPUs were run with layers of this package. SGLang's are those of 0.5.23 that need no extra package, llama.cpp's and MLX's follow
from their formats, ONNX Runtime GenAI's are those of its model builder 0.18; read, not run. This module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_quant.core.k_quants import COLUMNS, K_QUANTS
from hf_quant.core.scheme import QuantScheme

NVIDIA = "vllm"


@dataclass(frozen=True)
class Rule:
    """Layers that one kernel of an engine runs.

    Attributes:
        kernel: What it is called.
        formats: In which formats; names of files in ``hf_quant/formats``, or ``"gguf"``.
        bits: Of the codes.
        symmetric: With zero points (False), or without (True).
        groups: Group sizes, -1 for whole rows; None for all that the format holds.
        activations: As in a `QuantScheme`.
        rows: What out_features must be a multiple of, on each device.
        columns: Likewise in_features.
        blocks: Types of K-quants; with them, no other scheme.
    """

    kernel: str
    formats: tuple[str, ...]
    bits: tuple[int, ...] = (4,)
    symmetric: tuple[bool, ...] = (True, False)
    groups: tuple[int, ...] | None = None
    activations: tuple[str | None, ...] = (None,)
    rows: int = 1
    columns: int = 1
    blocks: tuple[str, ...] = ()

    def takes(self, scheme: QuantScheme) -> bool:
        """Whether it runs such codes in some shape."""
        if scheme.blocks or self.blocks:
            return scheme.blocks in self.blocks
        plain = not (scheme.codebook or scheme.real_zero or scheme.permuted or scheme.outliers)
        return (
            plain and scheme.bits in self.bits and scheme.symmetric in self.symmetric
            and scheme.activations in self.activations and (self.groups is None or scheme.group_size in self.groups)
        )  # fmt: skip

    def example(self) -> QuantScheme:
        """A scheme that it runs."""
        if self.blocks:
            return QuantScheme.of_blocks(self.blocks[0])
        size = 128 if self.groups is None or 128 in self.groups else self.groups[0]
        return QuantScheme(self.bits[0], size, self.symmetric[0], activations=self.activations[0])


PACKED = ("compressed_tensors", "gptq")
ROW = (-1,)
RULES: Mapping[str, tuple[Rule, ...]] = {
    "vllm-cpu": (
        Rule("CPU WNA16", (*PACKED, "awq"), rows=32, columns=32),
        Rule("CPU WNA16, activations in 16 bits", ("compressed_tensors",), activations=("token",), rows=32, columns=32),
        Rule("CPU INT8 (oneDNN)", ("compressed_tensors",), (8,), (True,), ROW, ("token", "tensor")),
    ),
    "vllm-rocm": (
        Rule("RDNA or Triton W4A16", (*PACKED, "awq"), rows=8, columns=8),
        Rule("Exllama (float16 only)", PACKED, (4, 8), (True,), (32, 64, 128, 256, 512), rows=8),
        Rule("Triton INT8 (scaled_mm)", ("compressed_tensors",), (8,), (True,), ROW, ("token", "tensor")),
    ),
    "vllm-xpu": (
        Rule("XPU WNA16", (*PACKED, "awq"), groups=(-1, 32, 64, 128, 256, 512), columns=32),
        Rule("XPU W4A8", ("compressed_tensors",), (4,), (True,), (-1, 32, 64, 128, 256), ("token",), rows=8, columns=8),
    ),
    "sglang": (
        Rule("Marlin", PACKED, (4, 8), (True,), (-1, 32, 64, 128), rows=64, columns=128),
        Rule("AWQ Marlin", ("awq",), groups=(32, 64, 128), rows=64, columns=128),
        Rule("CUTLASS INT8", ("compressed_tensors",), (8,), (True,), ROW, ("token",)),
    ),
    "llama.cpp": (
        Rule("Q4_0, Q4_1, Q5_0 or Q8_0 as they are", ("gguf",), (2, 3, 4, 8), groups=(-1, *(32 << i for i in range(12))),
             activations=(None, "token")),
        Rule("K-quants as they are", ("gguf",), blocks=tuple(K_QUANTS), columns=COLUMNS),
    ),
    "mlx": (
        Rule("affine quantized_matmul", ("mlx",), (2, 3, 4, 8), groups=(-1, *(32 << i for i in range(12))), columns=32),
    ),
    "onnx": (
        Rule("MatMulNBits", ("gptq", "awq"), (4,), groups=tuple(16 << i for i in range(5)), columns=16),
        Rule("MatMulNBits", ("gptq",), (8,), groups=tuple(16 << i for i in range(5)), columns=16),
    ),
}  # fmt: skip
ENGINE_NAMES = (NVIDIA, *RULES)


def nearest(rules: tuple[Rule, ...], scheme: QuantScheme, fmt: str, label: Mapping[str, str]) -> str:
    """A sentence on the nearest thing that an engine runs, for a scheme that it does not run in format ``fmt``.

    Args:
        rules: Of the engine.
        scheme: Of the layer.
        fmt: Name of the format.
        label: Name of a format to what ``--to`` calls it.
    """
    others = dict.fromkeys(name for rule in rules if rule.takes(scheme) for name in rule.formats if name != fmt)
    if fmt not in {name for rule in rules if rule.takes(scheme) for name in rule.formats} and others:
        return f"it runs {scheme} from {' or '.join(label.get(name, name) for name in others)}: hf-quant convert --to"
    close = min(rules, key=lambda rule: (scheme.activations not in rule.activations, scheme.bits not in rule.bits,
                                         scheme.symmetric not in rule.symmetric))  # fmt: skip
    form = " or ".join(label.get(name, name) for name in close.formats)
    return f"the nearest that it runs is {close.example()} in {form}, for which the model is quantized anew"
