"""In which format an engine runs layers: the one they have, or else the nearest one that `convert` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import FormatError, OptionError, SchemeError, suggestion
from hf_quant.formats import Format, Layer, conversion_targets, formats
from hf_quant.gguf.codes import why_not as why_no_blocks
from hf_quant.jobs.engines import ENGINES, Verdict

GGUF = "gguf"


@dataclass(frozen=True)
class Served:
    """What an engine does with layers.

    Attributes:
        target: The engine.
        tp: Devices that share each layer.
        to: Label of the format that they have to be converted to; None as they are.
        verdict: Of the engine, for that format.
    """

    target: str
    tp: int
    to: str | None
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"target": self.target, "tp": self.tp, "convert_to": self.to,
                "kernels": self.verdict.kernels, "refused": self.verdict.refused}  # fmt: skip

    def lines(self) -> list[str]:
        """For a person."""
        how = "as it is" if self.to is None else f"by hf-quant convert --to {self.to}"
        return [f"{self.target}, {how}: {line}" for line in self.verdict.lines()]


def check_target(target: str | None, tp: int) -> None:
    """Refuse an engine that is not known, or devices without an engine.

    Raises:
        OptionError: Says which there are.
    """
    if target is not None and target not in ENGINES:
        raise OptionError(f"--target {target}: there is {', '.join(ENGINES)}{suggestion(target, ENGINES)}")
    if tp != 1 and target is None:
        raise OptionError("--tp says how --target splits the layers: name a --target")


def served(target: str, tp: int, now: str, layers: Mapping[str, Layer]) -> Served:
    """How an engine runs most of these layers.

    Args:
        target: One of `ENGINES`.
        tp: Devices that share each layer.
        now: Name of the format that they have.
        layers: By name.
    """
    others = sorted(conversion_targets().items(), key=lambda item: not formats()[item[1]].automatic)
    labels: dict[str, str | None] = {now: None} | {name: label for label, name in others if name != now} | {GGUF: GGUF}
    tried = [Served(target, tp, label, _verdict(target, tp, fmt, layers)) for fmt, label in labels.items()]
    return min(tried, key=lambda one: sum(map(len, one.verdict.refused.values())))


def _verdict(target: str, tp: int, fmt: str, layers: Mapping[str, Layer]) -> Verdict:
    """Of the engine, for the layers that the format holds; the others are refused."""
    refused: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if (reason := _not_held(fmt, layer)) is not None:
            refused.setdefault(reason, []).append(name)
    unheld = {name for names in refused.values() for name in names}
    verdict = ENGINES[target](fmt, {name: layer for name, layer in layers.items() if name not in unheld}, tp)
    return Verdict(verdict.kernels, verdict.refused | refused)


def _not_held(fmt: str, layer: Layer) -> str | None:
    """Why a format does not hold a layer; None where it does, or where the engine has more to say."""
    if layer.scheme is None or len(layer.shape) != 2:
        return None
    if fmt == GGUF:
        return why_no_blocks(layer.scheme)
    return why_unheld(formats()[fmt], layer, layer.scheme)


def why_unheld(fmt: Format, layer: Layer, scheme: QuantScheme) -> str | None:
    """Why a format does not hold a layer of that scheme, or each of its stacked matrices; None where it does."""
    if (reason := fmt.why_not(scheme)) is not None:
        return reason
    try:
        fmt.layout((layer.shape[-2], layer.shape[-1]), scheme, layer.scale_dtype)
    except (FormatError, SchemeError) as error:
        return str(error)
    return None
