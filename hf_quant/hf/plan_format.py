"""The format that a plan is saved in, and the layers that stay in floating point for its sake."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from hf_quant.core.scheme import MULTIPLE, QuantScheme
from hf_quant.errors import PlanError
from hf_quant.formats import Format, formats, in_memory_format, saved_formats
from hf_quant.hf.candidates import Candidate
from hf_quant.hf.config import AUTO, HfQuantConfig

SUBSTANTIAL = 0.05  # of the weights to quantize: so many in layers that need padding, or in convolutions, are worth a format that fewer programs read


@dataclass
class Draft:
    """A plan that is not complete yet."""

    schemes: dict[str, QuantScheme] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    regrouped: dict[str, str] = field(default_factory=dict)


def leave_convolutions(config: HfQuantConfig, by_name: dict[str, Candidate], draft: Draft) -> None:
    """Leave convolutions in floating point that no override names, where they save little or the format has no place for them."""
    convolutions = _unnamed(config, [name for name in draft.schemes if by_name[name].kind == "patches"])
    fmt = None if config.format == AUTO else formats()[config.format]
    if _share(convolutions, by_name, draft) <= SUBSTANTIAL:
        reason = f"a convolution, and all are less than {SUBSTANTIAL:.0%} of the weights to quantize; an override quantizes it"
    elif fmt is not None and not fmt.in_memory:
        reason = f"a convolution; format={in_memory_format()!r} holds it"
    else:
        return
    for name in convolutions:
        _leave(name, reason, draft)


def leave_padded(config: HfQuantConfig, by_name: dict[str, Candidate], draft: Draft) -> bool:
    """Leave layers that need padding in floating point where the format has no place for it; whether there were some.

    ``"auto"`` gives up the format that it would choose without them only where they are `SUBSTANTIAL`, or named by an override.
    """
    padded = _unnamed(config, [name for name, scheme in draft.schemes.items() if scheme.padding])
    others = replace(draft, schemes={name: scheme for name, scheme in draft.schemes.items() if name not in padded})
    auto = config.format == AUTO
    fmt = formats()[format_of(config.format, by_name, others)[0]]
    if fmt.in_memory or (auto and _share(padded, by_name, draft) > SUBSTANTIAL):
        return False
    for name in padded:
        _leave(
            name,
            f"in_features {by_name[name].in_features} is not a multiple of {MULTIPLE}; format={in_memory_format()!r} pads it"
            + (
                f", and so does {AUTO!r} if that is more than {SUBSTANTIAL:.0%} of the weights to quantize"
                if auto
                else ""
            ),
            draft,
        )
    return bool(padded)


def _unnamed(config: HfQuantConfig, names: list[str]) -> list[str]:
    """Those that no override names."""
    return [name for name in names if not any(fnmatchcase(name, glob) for glob in config.overrides)]


def _share(names: list[str], by_name: dict[str, Candidate], draft: Draft) -> float:
    """Of these layers in the weights to quantize."""
    sizes = {name: math.prod(by_name[name].shape) for name in draft.schemes}
    return sum(sizes[name] for name in names) / max(1, sum(sizes.values()))


def _leave(name: str, reason: str, draft: Draft) -> None:
    del draft.schemes[name]
    draft.left[name] = reason
    draft.regrouped.pop(name, None)


def format_of(asked: str, by_name: dict[str, Candidate], draft: Draft) -> tuple[str, str]:
    """Name of the format to save in, and why; ``"auto"`` prefers formats that other software reads too."""
    if asked != AUTO:
        if (reason := _unfit(formats()[asked], by_name, draft)) is not None:
            raise PlanError(f"format {asked} cannot hold this plan: {reason}")
        return asked, "as asked"
    preferred = [name for name in saved_formats() if formats()[name].automatic]
    reasons = {name: _unfit(formats()[name], by_name, draft) for name in preferred}
    if fitting := next((name for name, reason in reasons.items() if reason is None), None):
        return fitting, "other software reads it too"
    return in_memory_format(), "; ".join(
        f"{formats()[name].label} cannot: {reason}" for name, reason in reasons.items()
    )


def _unfit(fmt: Format, by_name: dict[str, Candidate], draft: Draft) -> str | None:
    """Why a format cannot hold the plan; None if it can."""
    for name, scheme in draft.schemes.items():
        if (reason := fmt.why_not(scheme)) is not None:
            return reason
        if not fmt.in_memory and by_name[name].kind != "linear":
            kind = "a convolution" if by_name[name].kind == "patches" else by_name[name].kind
            return f"it holds plain linear layers only, and {name} is {kind}"
    return None
