"""What other engines can run, asked before anything is written: rules of their kernels, as sentences.

vLLM's rules are those of its main branch in autumn 2026 (``vllm/model_executor/kernels/linear/mixed_precision`` and
``layers/quantization/utils/{marlin,machete}_utils.py``); they were read, not run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hf_quant.errors import HfQuantError
from hf_quant.formats import Layer
from hf_quant.scheme import QuantScheme

FORMATS = ("compressed_tensors", "gptq", "awq")  # what vLLM reads without this package
ROWS = ("o_proj", "down_proj", "out_proj", "dense_4h_to_h", "fc2", "w2", "wo")  # split along the input features
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_EXPERT = re.compile(r".*\.experts\.\d+\.")


@dataclass(frozen=True)
class Verdict:
    """What an engine will do with a checkpoint.

    Attributes:
        kernels: Kernel to the number of layers it will run, the most used one first.
        refused: Sentence to the layers it is about; empty if everything runs.
    """

    kernels: dict[str, int]
    refused: dict[str, list[str]]

    def lines(self) -> list[str]:
        """For a person."""
        made = [f"{count} layers: {kernel}" for kernel, count in self.kernels.items()]
        for reason, names in self.refused.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            made.append(f"cannot run {names[0]}{more}: {reason}")
        return made


def vllm(fmt: str, layers: Mapping[str, Layer], tp: int = 1) -> Verdict:
    """Which of vLLM's CUDA kernels will run each layer.

    Args:
        fmt: Name of the format that the checkpoint is, or shall be, stored in.
        layers: Its quantized layers by name; experts apart.
        tp: Number of GPUs that share each layer (``--tensor-parallel-size``).

    Raises:
        HfQuantError: ``tp`` is less than one.
    """
    if tp < 1:
        raise HfQuantError(f"--tp {tp}: must be at least 1")
    kernels: Counter[str] = Counter()
    refused: dict[str, list[str]] = {}
    for name, layer in layers.items():
        outcome = _one(fmt, name, layer, tp)
        if outcome.startswith("!"):
            refused.setdefault(outcome[1:], []).append(name)
        else:
            kernels[outcome] += 1
    for reason, names in _unequal(layers).items():
        refused.setdefault(reason, []).extend(names)
    return Verdict(dict(kernels.most_common()), refused)


def _one(fmt: str, name: str, layer: Layer, tp: int) -> str:
    """The kernel, or ``!`` and why there is none."""
    scheme = layer.scheme
    if fmt not in FORMATS:
        return f"!it does not read {fmt}: convert to {' or '.join(FORMATS)}"
    if scheme is None:
        return "!not in integer codes"
    if len(layer.shape) != 2:
        return "!experts must stand apart in the file"
    n, k = layer.shape
    leaf, rows = name.rpartition(".")[2], name.rpartition(".")[2] in ROWS
    if (k if rows else n) % tp:
        return f"!{'in' if rows else 'out'}_features {k if rows else n} cannot be split over {tp} GPUs"
    part = _Part(scheme, n // (1 if rows else tp), k // (tp if rows else 1), k, fmt)
    if _EXPERT.match(name):
        return _expert(part, leaf)
    if fmt == "gptq" and not scheme.symmetric:
        return "GPTQ kernel (float16)" if part.whole_groups() else f"!{part.cut()}"
    reasons = []
    for kernel, why_not in (
        ("Machete (Hopper) or Marlin", _machete),
        ("Marlin", _marlin),
        ("GPTQ kernel (float16)", _exllama),
    ):
        reason = why_not(part)
        if reason is None:
            return kernel
        reasons.append(reason)
    return f"!{reasons[1]}"


@dataclass(frozen=True)
class _Part:
    """What one GPU has of a layer."""

    scheme: QuantScheme
    n: int
    k: int
    whole_k: int
    fmt: str

    def whole_groups(self) -> bool:
        """Whether no group is cut by the split over GPUs."""
        size = self.scheme.group_size
        return size == -1 or size >= self.whole_k or self.k % size == 0

    def cut(self) -> str:
        """That it is, as a sentence."""
        return f"groups of {self.scheme.group_size} are cut where {self.k} input features stand on each GPU"


def _types(part: _Part, with_zeros: tuple[int, ...]) -> str | None:
    allowed = (4, 8) if part.scheme.symmetric else with_zeros
    if part.scheme.codebook or part.scheme.real_zero or part.scheme.bits not in allowed:
        return f"{part.scheme} is none of its types"
    return None


def _machete(part: _Part) -> str | None:
    if (reason := _types(part, (4, 8)) or _marlin(part)) is not None:
        return reason
    if part.scheme.group_size not in (-1, 64, 128) or part.k % 64 or part.n % 128:
        return "Machete takes groups of 64, 128 or a row, and multiples of 64 input and 128 output features"
    if part.scheme.permuted and part.k != part.whole_k:
        return "Machete does not split columns in another order over GPUs"
    return None


def _marlin(part: _Part) -> str | None:
    if (reason := _types(part, (4,))) is not None:
        return reason
    if part.scheme.group_size not in (-1, 32, 64, 128):
        return f"Marlin takes groups of 32, 64, 128 or a row, not of {part.scheme.group_size}"
    if not part.whole_groups():
        return part.cut()
    if (part.scheme.permuted or part.fmt == "awq") and (part.n % 64 or part.k % 128):
        return f"Marlin takes multiples of 128 input and 64 output features here, not {part.k} and {part.n}"
    return None


def _exllama(part: _Part) -> str | None:
    if part.fmt == "awq":
        return None if part.whole_groups() else part.cut()
    if part.scheme.bits not in (4, 8) and part.fmt != "gptq":
        return f"{part.scheme} is none of its types"
    if part.scheme.permuted and part.k != part.whole_k:
        return "columns in another order cannot be split over GPUs"
    if part.scheme.group_size == -1 or not part.whole_groups():
        return "the GPTQ kernel needs whole groups"
    return None


def _expert(part: _Part, leaf: str) -> str:
    hidden, inner = (part.n, part.k) if leaf in ROWS else (part.k, part.n)
    size = part.scheme.group_size
    if (reason := _types(part, (4,))) is not None:
        return f"!{reason}"
    if size not in (-1, 32, 64, 128) or hidden % 128 or inner % max(64, size):
        return f"!fused Marlin for experts takes a hidden size in multiples of 128 and {max(64, size)} inner features, not {hidden} and {inner}"
    return "fused Marlin for experts"


def _unequal(layers: Mapping[str, Layer]) -> dict[str, list[str]]:
    """Layers that vLLM makes one, but which are quantized in different ways."""
    made: dict[str, list[str]] = {}
    for name in layers:
        stem, _, leaf = name.rpartition(".")
        for family in FUSED:
            if leaf != family[0]:
                continue
            members = [f"{stem}.{other}" for other in family]
            if len({layers[m].scheme if m in layers else None for m in members}) > 1:
                made.setdefault(f"{', '.join(family)} become one layer there and must have one scheme", []).append(
                    name
                )
    return made


ENGINES: dict[str, Callable[[str, Mapping[str, Layer], int], Verdict]] = {"vllm": vllm}
