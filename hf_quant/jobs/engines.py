"""What other engines can run, asked before anything is written: rules of their kernels, as sentences.

vLLM's are those of version 0.33.0 on NVIDIA GPUs with its own dependency Humming, read in ``vllm/model_executor/layers/quantization/auto_gptq.py``,
``auto_awq.py``, ``utils/{marlin,machete}_utils.py`` and ``vllm/model_executor/kernels/linear/mixed_precision``; not run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import HfQuantError
from hf_quant.formats import Format, Layer, formats
from hf_quant.jobs.engine_rules import NVIDIA, RULES, Rule, nearest

ROWS = ("o_proj", "down_proj", "out_proj", "dense_4h_to_h", "fc2", "w2", "wo")  # split along the input features
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
HYBRID = (("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"))  # linear attention of Qwen3-Next and Qwen3.5
_EXPERT = re.compile(r".*\.experts\.\d+\.")


@dataclass(frozen=True)
class Verdict:
    """How an engine runs a checkpoint.

    Attributes:
        kernels: Kernel to number of its layers, the most used one first.
        refused: Reason to the layers that cannot run; empty if all can.
    """

    kernels: dict[str, int]
    refused: dict[str, list[str]]

    def lines(self) -> list[str]:
        """For a person."""
        sentences = [f"{count} layers: {kernel}" for kernel, count in self.kernels.items()]
        for reason, names in self.refused.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            sentences.append(f"cannot run {names[0]}{more}: {reason}")
        return sentences


def vllm(fmt: str, layers: Mapping[str, Layer], tp: int = 1) -> Verdict:
    """The CUDA kernels of vLLM for each layer.

    Args:
        fmt: Name of the format of the checkpoint.
        layers: Its quantized layers by name, experts unstacked.
        tp: Number of GPUs that share each layer (``--tensor-parallel-size``).

    Raises:
        HfQuantError: ``tp`` is less than one.
    """
    reader = formats().get(fmt)

    def outcome(name: str, layer: Layer) -> str:
        if reader is None or not reader.vllm:
            return f"!it does not read {fmt}: convert to {' or '.join(n for n, f in formats().items() if f.vllm)}"
        return _one(reader, name, layer, tp)

    verdict = _verdict(layers, tp, outcome)
    for reason, names in _unequal(layers).items():
        verdict.refused.setdefault(reason, []).extend(names)
    return verdict


def _verdict(layers: Mapping[str, Layer], tp: int, outcome: Callable[[str, Layer], str]) -> Verdict:
    """Counts what becomes of each layer: a kernel, or ``!`` and why there is none."""
    if tp < 1:
        raise HfQuantError(f"--tp {tp}: must be at least 1")
    kernels: Counter[str] = Counter()
    refused: dict[str, list[str]] = {}
    for name, layer in layers.items():
        result = outcome(name, layer)
        if result.startswith("!"):
            refused.setdefault(result[1:], []).append(name)
        else:
            kernels[result] += 1
    return Verdict(dict(kernels.most_common()), refused)


def _one(fmt: Format, name: str, layer: Layer, tp: int) -> str:
    """The kernel, or ``!`` and why there is none."""
    scheme = layer.scheme
    if scheme is None:
        return "!not in integer codes"
    if len(layer.shape) != 2:
        return "!experts must stand apart in the file"
    n, k = layer.shape
    leaf = name.rpartition(".")[2]
    by_rows = leaf in ROWS
    if (k if by_rows else n) % tp:
        return f"!{'in' if by_rows else 'out'}_features {k if by_rows else n} cannot be split over {tp} GPUs"
    if scheme.activations:
        return _int8(scheme, fmt, bool(_EXPERT.match(name)))
    part = _Part(scheme, n if by_rows else n // tp, k // tp if by_rows else k, k)
    if (reason := _never(fmt, part)) is not None:
        return f"!{reason}"
    if _EXPERT.match(name):
        return _expert(part, leaf)
    return fmt.vllm_kernel(scheme, marlin=scheme.group_size in MARLIN) or _mixed(part)


@dataclass(frozen=True)
class _Part:
    """The part of a layer on one GPU."""

    scheme: QuantScheme
    n: int
    k: int
    whole_k: int


MARLIN = (-1, 32, 64, 128)
HUMMING = "Humming (Turing and newer)"


def _int8(scheme: QuantScheme, fmt: Format, expert: bool) -> str:
    """INT8 activations, of formats that vLLM reads them in: 8 bits with one scale a row, or packed codes and inputs by row."""
    if fmt.vllm_int8 and scheme.activations == "token" and (scheme.bits, scheme.group_size) != (8, -1):
        return HUMMING if not scheme.outliers else f"!{scheme} is none of its types"
    if not fmt.vllm_int8 or scheme.bits != 8 or scheme.group_size != -1 or scheme.outliers or not scheme.symmetric:
        held = " or ".join(name for name, other in formats().items() if other.vllm_int8)
        return f"!of INT8 activations it runs W8A8 without zero points, and packed codes with inputs by row, in {held}, not {scheme} in {fmt.label}"
    if expert and scheme.activations != "token":
        return f"!experts take activations by token, not {scheme}"
    return "fused Triton for experts in INT8" if expert else "CUTLASS INT8 (scaled_mm)"


def _never(fmt: Format, part: _Part) -> str | None:
    """Why no kernel at all takes it."""
    scheme, size = part.scheme, part.scheme.group_size
    if scheme.codebook or scheme.real_zero or scheme.outliers or scheme.blocks:
        return f"{scheme} is none of its types"
    if scheme.permuted:
        return "columns in another order (desc_act) are no longer supported"
    if size not in (-1, part.whole_k) and part.k % size:
        return f"groups of {size} are cut where {part.k} input features stand on each GPU"
    return fmt.vllm_refusal(scheme, marlin=size in MARLIN)


def _mixed(part: _Part) -> str:
    """The first of vLLM's kernels for integer weights that runs it, in the order of vLLM."""
    scheme, size = part.scheme, part.scheme.group_size
    marlin = scheme.bits in ((4, 8) if scheme.symmetric else (4,)) and size in MARLIN
    if scheme.bits in (4, 8) and size in (-1, 64, 128) and part.k % 64 == 0 and part.n % 128 == 0:
        return "Machete on Hopper, else Marlin" if marlin else "Machete (Hopper only)"
    if marlin:
        return "Marlin"
    if scheme.symmetric and scheme.bits in (4, 8) and size > 0 and part.n % (32 // scheme.bits) == 0:
        return "Exllama (float16 only)"
    if scheme.bits == 4 and size in (*MARLIN, 256) and part.n % 8 == 0:
        return "Triton"
    return HUMMING


def _expert(part: _Part, leaf: str) -> str:
    hidden, inner = (part.n, part.k) if leaf in ROWS else (part.k, part.n)
    scheme, size = part.scheme, part.scheme.group_size
    if scheme.bits not in ((4, 8) if scheme.symmetric else (4,)) or size not in MARLIN:
        return f"{HUMMING} for experts"
    if hidden % 128 or (size > 0 and inner % size):
        return f"!experts of a hidden size in multiples of 128 and whole groups, not {hidden} and {inner}"
    return "fused Marlin for experts"


def _unequal(layers: Mapping[str, Layer]) -> dict[str, list[str]]:
    """Layers that vLLM fuses although they are quantized differently."""
    layers_by_reason: dict[str, list[str]] = {}
    for name in layers:
        stem, _, leaf = name.rpartition(".")
        for family in (*FUSED, *HYBRID):
            if leaf != family[0]:
                continue
            members = [f"{stem}.{other}" for other in family]
            if len({layers[m].scheme if m in layers else None for m in members}) > 1:
                layers_by_reason.setdefault(
                    f"{', '.join(family)} become one layer there and must have one scheme", []
                ).append(name)
    return layers_by_reason


def by_rules(rules: tuple[Rule, ...], fmt: str, layers: Mapping[str, Layer], tp: int = 1) -> Verdict:
    """What an engine whose rules are data does with each layer; arguments and errors as of `vllm`."""
    labels = {name: other.label for name, other in formats().items()}
    return _verdict(layers, tp, lambda name, layer: _by_rules(rules, fmt, name, layer, tp, labels))


def _by_rules(rules: tuple[Rule, ...], fmt: str, name: str, layer: Layer, tp: int, labels: Mapping[str, str]) -> str:
    """The kernel, or ``!`` and why there is none."""
    scheme = layer.scheme
    if scheme is None:
        return f"!not in integer codes ({layer.note})"
    if len(layer.shape) != 2:
        return "!experts must stand apart in the file"
    fitting = [rule for rule in rules if fmt in rule.formats and rule.takes(scheme)]
    if not fitting:
        return f"!it does not run {scheme} in {labels.get(fmt, fmt)}; {nearest(rules, scheme, fmt, labels)}"
    by_rows = name.rpartition(".")[2] in ROWS
    n: float
    k: float
    n, k = layer.shape
    n, k = (n, k / tp) if by_rows else (n / tp, k)
    size = scheme.group_size
    for rule in fitting:
        if n % rule.rows == 0 and k % rule.columns == 0 and (size == -1 or k % size == 0):
            return rule.kernel
    rule = fitting[0]
    return (
        f"!{rule.kernel} needs out_features in multiples of {rule.rows} and in_features of {max(rule.columns, size)}, "
        f"not {n:g} and {k:g}"
    )


ENGINES: Mapping[str, Callable[[str, Mapping[str, Layer], int], Verdict]] = {
    NVIDIA: vllm,
    **{engine: partial(by_rules, rules) for engine, rules in RULES.items()},
}
