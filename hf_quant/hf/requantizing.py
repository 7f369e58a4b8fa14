"""Settings for a checkpoint that is quantized already: its codes stay what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_quant.core.scheme import QuantScheme
from hf_quant.errors import PlanError
from hf_quant.formats import format_of
from hf_quant.hf.config import SAID_BY_SCHEME, HfQuantConfig

OF_PLAN = ("scheme", *SAID_BY_SCHEME, "overrides", "modules_to_not_convert")  # fields that another format can repeat
OF_OTHERS = (
    "it is about checkpoints of other programs, and the schemes of this one say what becomes of its activations"
)


def refuse_requantizing(stored: Any, requested: HfQuantConfig | None) -> None:
    """Refuse settings for a checkpoint that is quantized already: its codes would stay what they are.

    Args:
        stored: ``quantization_config`` of the checkpoint.
        requested: The configuration it is loaded with.

    Raises:
        PlanError: ``requested`` says how to quantize, other than ``stored`` does.
    """
    stored = stored if isinstance(stored, Mapping) else stored.to_dict()
    if requested is None or requested.to_dict() == dict(stored):
        return
    differing = _differing(stored, requested)
    if differing:
        reason = OF_OTHERS if differing[0] == "activations" else quantized_already(stored)
        raise PlanError(f"quantization_config: {differing[0]}: {reason}")


def _differing(stored: Mapping[str, Any], requested: HfQuantConfig) -> list[str]:
    """The fields that were given and are not as in the checkpoint."""
    if stored.get("quant_method") == "hf_quant":
        return [name for name in requested.given if getattr(requested, name) != stored.get(name)]
    same = {"activations"}  # which way to run the layers is left open by other formats
    ours = stored.get("hf_quant")
    if isinstance(ours, Mapping):  # the same fields mean something else in checkpoints of other programs
        same |= {"method"} if requested.method == ours.get("method") else set()
        same |= {"format"} if requested.format == format_of(stored)[0] else set()
        same |= set(OF_PLAN) if _is_repeated(stored, requested) else set()
    return [name for name in requested.given if name not in same]


def _is_repeated(stored: Mapping[str, Any], requested: HfQuantConfig) -> bool:
    """Whether the format of a checkpoint that this package wrote says in its words the schemes that are asked for."""
    _, fmt = format_of(stored)
    if not fmt.saved:  # what hf-quant convert wrote, whose config has no schemes by name
        return False
    overrides = {name: QuantScheme.parse(slug) for name, slug in requested.overrides.items() if slug is not None}
    if any(fmt.why_not(scheme) is not None for scheme in (requested.default_scheme, *overrides.values())):
        return False
    return _holds(stored, fmt.config_of_plan(requested.default_scheme, overrides, requested.modules_to_not_convert))


def _holds(stored: Any, part: Any) -> bool:
    if isinstance(part, Mapping):
        return isinstance(stored, Mapping) and all(_holds(stored.get(name), value) for name, value in part.items())
    if isinstance(part, list):
        return isinstance(stored, list) and all(value in stored for value in part)
    return bool(stored == part)


def quantized_already(stored: Mapping[str, Any]) -> str:
    """A sentence on why a quantized checkpoint is not quantized again, and what to do.

    Args:
        stored: Its ``quantization_config``.
    """
    kind = str(stored.get("scheme") or stored.get("quant_method"))
    return (
        f"the checkpoint is quantized already ({kind[:50]!r}), so there is nothing left to round: quantize the model that it "
        "was made from, or make it a float one first: hf-quant convert FOLDER --to dense -o OUT"
    )
